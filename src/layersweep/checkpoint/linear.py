"""Which tensors of any Hugging Face checkpoint are weights of linear layers, told by their names.

A linear weight is a 2-D floating "....weight" inside a layer ("layers.3."). Embeddings, the head
and what else stands outside the layers, norms, biases, convolutions and parameters without
".weight" (A_log, sinks) are none. Nor are routers, which are linear layers in some releases of
transformers and bare parameters in others: they are small, and an error there sends a token to
another expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from layersweep.checkpoint.header import StoredTensor
from layersweep.families.weights import ROUTERS

FLOATS = ("BF16", "F16", "F32")
HEADS = frozenset({"head", "lm_head"})  # a layer that predicts further tokens may have its own
_NOT_LINEAR = re.compile(r"embed|norm|conv", re.IGNORECASE)
_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"
# Where published checkpoints keep a layer's experts -> how they spell the weights of one.
_SPELLING = {"block_sparse_moe": ("w1", "w3", "w2")}
_USUAL = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Planned:
    """A tensor to write under `name`, packed if `linear`. `stored`: its bytes in the source."""

    name: str
    stored: StoredTensor
    linear: bool


def plan_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[Planned]:
    """What becomes of each tensor, in the order given. Fused experts become an expert each."""
    for name, stored in tensors.items():
        parts = _fused_parts(name, tensors)
        if parts:
            yield from _split(name, stored, parts)
        else:
            yield Planned(name, stored, is_linear(name, stored))


def is_linear(name: str, stored: StoredTensor) -> bool:
    *modules, last = name.split(".")
    if last != "weight" or len(stored.shape) != 2 or stored.dtype not in FLOATS:
        return False
    if not math.prod(stored.shape) or not any(module.isdigit() for module in modules):
        return False
    if modules[-1] in HEADS or _NOT_LINEAR.search(modules[-1]):
        return False
    return not any(module in ROUTERS for module in modules)


def unpacked_modules(planned: Iterable[Planned]) -> list[str]:
    """Names for `llm_int8_skip_modules`: which modules transformers must not expect packed.

    The head always (a tied one has no tensor), and what else may be an nn.Linear, by the last two
    names ("mlp.gate").
    """
    found = {"lm_head"}
    for tensor in planned:
        *modules, last = tensor.name.split(".")
        matrix = last == "weight" and len(tensor.stored.shape) == 2 and not tensor.linear
        if matrix and not _NOT_LINEAR.search(modules[-1]):
            found.add("lm_head" if modules[-1] == "lm_head" else ".".join(modules[-2:]))
    return sorted(found)


def _fused_parts(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """The spellings of one expert's weights in a fused tensor that holds them as nn.Linear does.

    That is gate_up_proj [E, 2 I, H] and down_proj [E, H, I]. Other layouts (transposed, with
    biases) have no published names for packed experts: none.
    """
    base = name.removesuffix(".weight")
    folder = base.removesuffix(_UP).removesuffix(_DOWN)
    if folder == base:
        return ()
    pair = [tensors.get(name.replace(base, folder + part)) for part in (_UP, _DOWN)]
    if any(half is None or len(half.shape) != 3 or half.dtype not in FLOATS for half in pair):
        return ()
    up, down = (half.shape for half in pair if half is not None)
    if up != (down[0], 2 * down[2], down[1]):
        return ()
    gate, *others = _SPELLING.get(folder.rpartition(".")[2], _USUAL)
    return (gate, others[0]) if base.endswith(_UP) else (others[1],)


def _split(name: str, stored: StoredTensor, parts: tuple[str, ...]) -> Iterator[Planned]:
    """Expert by expert; the rows of a fused tensor are those of its parts, one after the other."""
    experts, rows, columns = stored.shape
    at = name[: name.rindex(".experts.")]
    flat = stored.reshaped((experts * len(parts), rows // len(parts), columns))
    for number in range(experts * len(parts)):
        expert, part = divmod(number, len(parts))
        own = f"{at}.experts.{expert}.{parts[part]}.weight"
        yield Planned(own, flat.rows(number, 1).reshaped(flat.shape[1:]), linear=True)
