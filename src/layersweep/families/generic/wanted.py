"""What files hold of a decoder that transformers' modules compute; see families/names.py."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layersweep.families.generic.interfaces import Unsupported
from layersweep.families.generic.names import Source, Weight, parts_of_an_expert, weights_of
from layersweep.families.generic.parts import GenericLayer
from layersweep.families.names import IGNORED_SUFFIX, Fused, Part, Wanted, Wants
from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape, Shape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_MATRIX = ".weight"

# Where files of models that read images, too, have their language model: in place of what the
# names of that model begin with when it is by itself.
_TEXT_PARTS = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "model.text_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}


def short(name: str) -> str:
    """A parameter's name in a block: that of a matrix without its last part."""
    return name.removesuffix(_MATRIX)


def split_key(key: str) -> tuple[int | None, str]:
    """(1, "gate_up_proj") of "1.gate_up_proj", (None, ...) of a key that is a whole parameter."""
    number, _, rest = key.partition(".")
    return (int(number), rest) if number.isdigit() else (None, key)


def stores_columns(experts: Any, parameter: Tensor) -> bool:
    """Whether a parameter of all experts has columns of their matrices where others have rows."""
    return bool(experts.is_transposed) and parameter.ndim == 3


def pieces_of(
    model: PreTrainedModel, experts: str, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, Shape]]:
    """Keys and shapes of one expert's weights: "down_proj", or "0.gate_up_proj" and
    "1.gate_up_proj" where files hold them apart."""
    for key, shape in shapes.items():
        parts = parts_of_an_expert(model, f"{experts}.{key}")
        if parts == 1:
            yield key, shape
        else:
            each = (shape[0] // parts, *shape[1:])
            yield from ((f"{part}.{key}", each) for part in range(parts))


class GenericNames:
    """Names by transformers' table of conversions. `model` on the meta device."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: tuple[GenericLayer, ...],
        blocks: tuple[BlockShape, ...],
        *,
        text_part: bool = False,
    ) -> None:
        self._text_part = text_part
        self._model, self._layers, self._blocks = model, layers, blocks
        self._shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        self._found: dict[str, list[Weight]] = {}
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = [re.compile(pattern) for pattern in patterns]

    def ignores(self, name: str) -> bool:
        """Whether a file may hold this tensor for others."""
        if self._text_part and not name.startswith(tuple(_TEXT_PARTS)):
            return True  # of images
        return name.endswith(IGNORED_SUFFIX) or any(one.search(name) for one in self._ignored)

    def outside(self, block: BlockShape, there: Mapping[str, object]) -> Iterator[Wanted]:
        """See families/names.py."""
        wants = self._wants(block, "", there)
        assert not wants.fused, "rows of a tensor beside the layers"
        yield from wants.single

    def layer(self, decoder: Decoder, index: int, there: Mapping[str, object]) -> Wants:
        """See families/names.py."""
        layer = self._layers[index]
        own = [block for block in self._blocks if block.layer == index]
        wants = self._wants(own[0], f"{layer.module}.", there)
        for key in {split_key(key)[1] for block in own[1:2] for key in block.weights}:
            members = [
                [name for name in block.weights if split_key(name)[1] == key] for block in own[1:]
            ]
            found = self._find(f"{layer.experts}.{key}", there)
            experts = self._model.get_submodule(layer.experts)
            columns = stores_columns(experts, experts.get_parameter(key))
            if found[0].expert is None:
                wants.fused.append(_all_experts(own[1:], members, found[0], columns))
                continue
            if columns:
                raise Unsupported(found[0].name, "an expert at a time, as columns", "them as rows")
            for block, keys, weight in zip(own[1:], members, found, strict=True):
                wants.single.extend(
                    Wanted(block.canonical(name), (source.stored,), block.weights[name])
                    for name, source in zip(keys, weight.sources, strict=True)
                )
        return wants

    def _wants(self, block: BlockShape, prefix: str, there: Mapping[str, object]) -> Wants:
        """Of a block that is no expert."""
        wants, shared = Wants([], []), dict[str, list[tuple[Part, Shape]]]()
        for key, shape in block.weights.items():
            part, whole = split_key(key)
            name = f"{prefix}{whole}"
            (weight,) = self._find(name if name in self._shapes else f"{name}{_MATRIX}", there)
            if part is not None:  # one of several, or some rows of the one that has them all
                if len(weight.sources) > 1:
                    source = weight.sources[part]
                    wants.single.append(Wanted(block.canonical(key), (source.stored,), shape))
                    continue
                before = shared.get(weight.sources[0].stored, [])
                start = sum(one.rows for one, _ in before)
                source = Source(weight.sources[0].stored, (start, start + shape[0]))
                weight = replace(weight, sources=(source,))
            if len(weight.sources) > 1:
                stored = ", ".join(source.stored for source in weight.sources)
                raise Unsupported(weight.name, f"{stored} in its place", "one tensor")
            (source,) = weight.sources
            if source.rows is None:
                wants.single.append(Wanted(block.canonical(key), (source.stored,), shape))
                continue
            first, stop = source.rows
            rows = Part(block.canonical(key), shape, first, stop - first)
            shared.setdefault(source.stored, []).append((rows, shape))
        for stored, parts in shared.items():
            total = (sum(one.rows for one, _ in parts), *parts[0][1][1:])
            wants.fused.append(Fused((stored,), total, tuple(one for one, _ in parts)))
        return wants

    def has_fused_experts(self, index: int, there: Container[str]) -> bool:
        """What is stored is compared with the modules, name by name."""
        return True

    def _find(self, name: str, there: Mapping[str, object]) -> list[Weight]:
        if not self._found:
            # what belongs to a quantized tensor is named after it
            whole = [key for key in there if not any(at in there for at in _shorter(key))]
            self._found = (
                self._of_text(whole) if self._text_part else weights_of(self._model, whole)
            )
        return self._found[name]

    def _of_text(self, stored: list[str]) -> dict[str, list[Weight]]:
        """By the names that the text part has by itself."""
        inner = {
            new + name.removeprefix(old): name
            for name in stored
            for old, new in _TEXT_PARTS.items()
            if name.startswith(old)
        }

        def back(weight: Weight) -> Weight:
            sources = (replace(one, stored=inner[one.stored]) for one in weight.sources)
            return replace(weight, sources=tuple(sources))

        found = weights_of(self._model, inner)
        return {name: [back(one) for one in weights] for name, weights in found.items()}


def _all_experts(
    blocks: list[BlockShape], members: list[list[str]], weight: Weight, columns: bool
) -> Fused:
    """All experts in one stored tensor, rows of each below those of the one before; `columns`
    where it has them transposed."""
    experts, *one = weight.shape
    parts, rows = [], 0
    for block, keys in zip(blocks, members, strict=True):
        for key in keys:
            shape = block.weights[key]
            own = shape[-1 if columns else 0] if len(one) > 1 else 1
            parts.append(Part(block.canonical(key), shape, rows, own))
            rows += own
    return Fused((weight.sources[0].stored,), (experts, *one), tuple(parts), columns)


def _shorter(name: str) -> Iterator[str]:
    """ "a.b" and "a" of "a.b.c"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
