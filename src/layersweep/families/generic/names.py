"""Which stored tensors make up each parameter of a decoder, by transformers' own table of names.

Files keep the names of their first publication: experts one by one, projections together or apart.
transformers knows how each becomes a parameter of its modules (`conversion_mapping`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from layersweep.errors import CheckpointError
from layersweep.families.generic.interfaces import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """A stored tensor, or its `rows` [first, stop)."""

    stored: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Weight:
    """A parameter of a module, or one expert's part of it: `sources` one below the other.

    `shape` is what they come to.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    expert: int | None = None


def weights_of(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, list[Weight]]:
    """By the names of parameters and buffers of `model`; a list has a Weight for each expert where
    these come one by one, else a single one.

    `stored`: names of the file's tensors, without what belongs to a quantized one. Raises
    CheckpointError for a parameter that nothing in the file makes, and Unsupported for a conversion
    that is more than names, rows and experts.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    arrived = _arrived(model, stored)
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    found: dict[str, list[Weight]] = {}
    for name, shape in shapes.items():
        target = name if name in arrived else tied.get(name, name)
        if target not in arrived:
            raise CheckpointError(
                f"found no tensor for {name}, needed one of shape {list(shape)}",
                hint="the file is not whole, or of another model than config.json says",
            )
        found[name] = _weights(name, shape, arrived[target])
    return found


@dataclass(frozen=True)
class _Arrival:
    """A stored tensor on its way: which pattern of its converter it matched, and which of its rows
    arrive here."""

    stored: str
    pattern: int
    converter: Any  # None for a plain name
    rows: tuple[int, int] | None = None


def _arrived(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, list[_Arrival]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        dot_natural_key,
        rename_source_key,
    )  # fmt: skip

    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in table if not isinstance(entry, WeightConverter)]
    by_pattern = {
        pattern: (entry, index)
        for entry in converters
        for index, pattern in enumerate(entry.source_patterns)
    }
    known = model.state_dict()
    found: dict[str, list[_Arrival]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        entry, index = by_pattern[pattern] if pattern else (None, 0)
        targets = entry.target_patterns if entry else [""]
        end = 0
        for other in targets:  # where there are several, the tensor's rows are shared out
            twin = name.replace(targets[0], other) if entry else name
            shared = len(targets) > 1 and twin in known
            start, end = end, end + (known[twin].shape[0] if shared else 0)
            rows = (start, end) if shared else None
            found.setdefault(twin, []).append(_Arrival(key, index, entry, rows))
    return found


@dataclass(frozen=True)
class _Joining:
    """Files have tensors of names that end with `sources` in place of one that ends with `target`:
    side by side in each expert, or one below the other."""

    of_experts: bool
    sources: tuple[str, ...]
    target: str


@lru_cache(maxsize=2)
def _joinings(model: PreTrainedModel) -> list[_Joining]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = []
    for entry in get_model_conversion_mapping(model):
        kinds = [type(op).__name__ for op in getattr(entry, "operations", ())]
        if kinds in (["MergeModulelist", "Concatenate"], ["Concatenate"]):
            target = entry.target_patterns[0].replace("\\.", ".")
            found.append(_Joining(len(kinds) > 1, tuple(entry.source_patterns), target))
    return found


def parts_of_an_expert(model: PreTrainedModel, name: str) -> int:
    """Of how many tensors, one below the other, files make an expert's part of a parameter."""
    counts = (
        len(one.sources) for one in _joinings(model) if one.of_experts and name.endswith(one.target)
    )
    return next(counts, 1)


def rows_together(model: PreTrainedModel, name: str) -> list[int]:
    """Rows of the tensors that files have in place of a parameter: of convolutions behind q, k and
    v as many as these have. Empty where they have it whole."""
    for one in _joinings(model):
        if not one.of_experts and name.endswith(one.target):
            known, prefix = model.state_dict(), name.removesuffix(one.target)
            near = [prefix + source.replace("conv1d", "proj") for source in one.sources]
            rows = [len(known[proj]) for proj in near if proj in known]
            if len(rows) == len(near) and sum(rows) == len(known[name]):
                return rows
    return []


def _weights(name: str, shape: tuple[int, ...], arrived: Sequence[_Arrival]) -> list[Weight]:
    entry = arrived[0].converter
    kinds = [type(op).__name__ for op in entry.operations] if entry else []
    dims = [getattr(op, "dim", None) for op in entry.operations] if entry else []
    if not kinds:
        if len(arrived) > 1:
            raise CheckpointError(
                f"{name}: found {', '.join(one.stored for one in arrived)}, needed one of them"
            )
        return [Weight(name, shape, (Source(arrived[0].stored),))]
    if kinds == ["Concatenate"] and dims == [0]:
        ordered = sorted(arrived, key=lambda one: one.pattern)
        return [Weight(name, shape, tuple(Source(one.stored) for one in ordered))]
    if kinds in (["Chunk"], ["Split"]) and dims == [0]:
        return [Weight(name, shape, (Source(arrived[0].stored, arrived[0].rows),))]
    merged = (["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1])
    if (kinds, dims) in merged:
        return _experts(name, shape, arrived)
    raise Unsupported(name, f"a conversion by {', '.join(kinds)}", "names, rows and experts alone")


def _experts(name: str, shape: tuple[int, ...], arrived: Sequence[_Arrival]) -> list[Weight]:
    """A Weight for each expert, its parts in the order of the converter's patterns."""
    parts = len(arrived[0].converter.source_patterns)
    by_part = [[one.stored for one in arrived if one.pattern == part] for part in range(parts)]
    counts = [len(stored) for stored in by_part]
    if set(counts) != {shape[0]}:
        raise CheckpointError(
            f"{name}: found {' and '.join(map(str, counts))} experts in the file, needed "
            f"{shape[0]} of each kind"
        )
    return [
        Weight(name, shape[1:], tuple(Source(stored) for stored in one), expert)
        for expert, one in enumerate(zip(*by_part, strict=True))
    ]
