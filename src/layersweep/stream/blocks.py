"""Blocks: the runs of weights that move and are used together.

A block is an embedding, one layer's attention (with its norms and router), a dense MLP, a shared
or a routed expert, or the head. Its stored tensors lie in one arena, each at a 256-byte-aligned
offset (packed tensors are only byte-aligned in their file), so that a block is one copy to the
device and is dequantized there.

    file bytes --RunReader--> arena (uint8) --Block.dense--> one dense weight in a scratch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.layout import Checkpoint, Weight
from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape, Role, blocks

ALIGNMENT = 256
# (quantized, "nf4" or "fp4", out): fills `out` with the dense weight
Decode = Callable[[nf4.QuantizedTensor, str, Tensor], None]
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Slot:
    """A byte range of an arena. `source` is None where the bytes are made while reading."""

    source: StoredTensor | None
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlacedWeight:
    """One weight inside a block's arena.

    `absmax` and the nested slots exist for quantized weights. Two things are made while reading:
    `quantize` marks a float weight that becomes plain NF4 (blocks of 64, float32 absmax), and
    nested scales that start inside a nested block, which no kernel takes, become plain ones.
    """

    weight: Weight
    data: Slot
    absmax: Slot | None = None
    nested_absmax: Slot | None = None
    nested_quant_map: Slot | None = None
    quantize: bool = False

    @property
    def slots(self) -> list[Slot]:
        slots = [self.data, self.absmax, self.nested_absmax, self.nested_quant_map]
        return [slot for slot in slots if slot is not None]

    @property
    def nested_offset(self) -> float:
        """Of quantized scales; 0 where they are plain."""
        quant = self.weight.quant
        return quant.nested.offset if quant and quant.nested and self.nested_absmax else 0.0

    @property
    def layout(self) -> tuple[object, ...]:
        """See BlockSpec.layout."""
        weight, quant = self.weight, self.weight.quant
        nested = quant.nested if quant else None
        places = tuple((slot.offset, slot.nbytes) for slot in self.slots)
        codes = (quant.kind, quant.blocksize) if quant else ()
        sizes = weight.shape, weight.data.dtype, weight.transposed
        return *sizes, places, codes, nested.blocksize if nested else 0, self.quantize

    @property
    def packed(self) -> bool:
        return self.quantize or self.weight.quant is not None


@dataclass(frozen=True)
class BlockSpec:
    """What a block holds and where. `nbytes` is the arena, `stored_bytes` what is read."""

    shape: BlockShape
    weights: Mapping[str, PlacedWeight]
    nbytes: int
    stored_bytes: int

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def role(self) -> Role:
        return self.shape.role

    @property
    def layer(self) -> int | None:
        return self.shape.layer

    @property
    def expert(self) -> int | None:
        return self.shape.expert

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """What is equal for blocks whose weights lie at the same places of their arenas and are
        decoded alike, but for the offsets of nested scales."""
        return tuple((key, *placed.layout) for key, placed in self.weights.items())


def block_specs(checkpoint: Checkpoint, *, quantize: bool = False) -> list[BlockSpec]:
    """All blocks of a checkpoint in sweep order; `quantize` turns float weights into NF4 (see
    BlockShape.packs)."""
    return specs_of(checkpoint.decoder, checkpoint.weights, quantize=quantize)


def specs_of(
    decoder: Decoder, weights: Mapping[str, Weight], *, quantize: bool = False
) -> list[BlockSpec]:
    """Blocks of a model's weights, by canonical name: embed, layers, head."""
    return [_spec(block, weights, quantize) for block in blocks(decoder)]


def _spec(block: BlockShape, weights: Mapping[str, Weight], quantize: bool) -> BlockSpec:
    placed, end = {}, 0
    for key in block.weights:
        weight = weights[block.canonical(key)]
        to_nf4 = quantize and weight.quant is None and block.packs(key)
        placed[key], end = _place(weight, end, to_nf4)
    stored = sum(read_bytes(p.weight) for p in placed.values())
    return BlockSpec(block, placed, end, stored)


def blocks_of(specs: Sequence[BlockSpec], layers: range) -> list[BlockSpec]:
    """Blocks of some consecutive layers, with the embedding before the first of all and the head
    after the last. `specs`: of the whole model, in sweep order."""
    last = max(spec.layer for spec in specs if spec.layer is not None)
    ends = layers[0] == 0, layers[-1] == last
    of = [spec for spec in specs if spec.layer is not None and spec.layer in layers]
    return [*(specs[:1] if ends[0] else []), *of, *(specs[-1:] if ends[1] else [])]


def split_experts(specs: Sequence[BlockSpec]) -> tuple[list[BlockSpec], list[BlockSpec]]:
    """What every token uses, and routed experts; each in sweep order."""
    always = [spec for spec in specs if spec.role != "expert"]
    return always, [spec for spec in specs if spec.role == "expert"]


def read_bytes(weight: Weight) -> int:
    """Bytes read per visit: companions that were checked at opening are not read again."""
    return sum(tensor.nbytes for tensor in weight.stored)


def _place(weight: Weight, end: int, quantize: bool) -> tuple[PlacedWeight, int]:
    def slot(source: StoredTensor | None, nbytes: int) -> Slot:
        nonlocal end
        taken = Slot(source, end, nbytes)
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return taken

    if quantize:
        elements = torch.Size(weight.shape).numel()
        data = slot(None, -(-elements // 2))
        absmax = slot(None, 4 * -(-elements // 64))
        return PlacedWeight(weight, data, absmax, quantize=True), end
    data = slot(weight.data, weight.data.nbytes)
    if weight.quant is None:
        return PlacedWeight(weight, data), end
    quant, nested = weight.quant, weight.quant.nested
    if nested is not None and nested.skip:
        absmax = slot(None, 4 * math.prod(quant.absmax.shape))
        return PlacedWeight(weight, data, absmax), end
    absmax = slot(quant.absmax, quant.absmax.nbytes)
    if nested is None:
        return PlacedWeight(weight, data, absmax), end
    nested_absmax = slot(nested.absmax, nested.absmax.nbytes)
    quant_map = slot(nested.quant_map, nested.quant_map.nbytes)
    return PlacedWeight(weight, data, absmax, nested_absmax, quant_map), end


class Block:
    """A block whose bytes have arrived in `arena` (uint8, on the compute device)."""

    def __init__(self, spec: BlockSpec, arena: Tensor, decode: Decode = nf4.decode) -> None:
        self.spec, self.arena, self._decode = spec, arena, decode
        self._packed: dict[str, nf4.QuantizedTensor] = {}

    def _view(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        return self.arena[slot.offset : slot.offset + slot.nbytes].view(dtype)

    def packed(self, key: str) -> nf4.QuantizedTensor:
        """A quantized weight as it lies in the arena (views, made once)."""
        if key not in self._packed:
            self._packed[key] = self._found(self.spec.weights[key])
        return self._packed[key]

    def _found(self, placed: PlacedWeight) -> nf4.QuantizedTensor:
        quant = placed.weight.quant
        assert placed.absmax is not None
        data = self._view(placed.data, torch.uint8)
        blocksize = 64 if quant is None else quant.blocksize
        if placed.nested_absmax is None:
            absmax = self._view(placed.absmax, torch.float32)
            return nf4.QuantizedTensor(data, absmax, blocksize, None)
        assert quant is not None and quant.nested is not None
        assert placed.nested_quant_map is not None
        nested = nf4.NestedScales(
            self._view(placed.nested_absmax, torch.float32),
            self._view(placed.nested_quant_map, torch.float32),
            quant.nested.blocksize,
            quant.nested.offset,
        )
        return nf4.QuantizedTensor(data, self._view(placed.absmax, torch.uint8), blocksize, nested)

    def stored(self, key: str) -> Tensor:
        """A float weight as it lies in the file (a view: dtype of the file)."""
        weight = self.spec.weights[key].weight
        dtype = STORED_DTYPES[weight.data.dtype]
        found = self._view(self.spec.weights[key].data, dtype)
        return found.view(weight.shape[::-1]).t() if weight.transposed else found.view(weight.shape)

    def dense(self, key: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype`, in memory of its own: `out` (same shape and dtype) if given."""
        placed = self.spec.weights[key]
        if out is None:
            out = torch.empty(placed.weight.shape, dtype=dtype, device=self.arena.device)
        if not placed.packed:
            # always a copy: the arena is reused as soon as the block is released
            return out.copy_(self.stored(key))
        quant = placed.weight.quant
        self._decode(self.packed(key), "nf4" if quant is None else quant.kind, out)
        return out
