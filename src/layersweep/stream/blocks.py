"""Blocks: the runs of weights that move and are used together.

A block is an embedding, one layer's attention (with its norms and router), a dense MLP, a shared
or a routed expert, or the head. Its stored tensors lie in one arena, each at a 256-byte-aligned
offset (packed tensors are only byte-aligned in their file), so that a block is one copy to the
device and is dequantized there.

    file bytes --RunReader--> arena (uint8) --Block.dense--> one dense weight in a scratch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.layout import Checkpoint, Weight
from layersweep.checkpoint.storage import Packed, Storage
from layersweep.checkpoint.storage.floats import Floats, Values
from layersweep.checkpoint.storage.four_bit import MadeNf4
from layersweep.collector import collector_paused
from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape, Role, blocks

ALIGNMENT = 256
Decode = Callable[[Packed, Tensor], None]  # fills the second with the dense weight


class Slot(NamedTuple):  # of which a model has 100,000
    """A byte range of an arena. `source` is None where the bytes are made while reading."""

    source: StoredTensor | None
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlacedWeight:
    """One weight inside a block's arena. `storage`: how it lies there, in `slots`; not always as in
    the file, since floats may become NF4 while they are read."""

    weight: Weight
    storage: Storage
    slots: tuple[Slot, ...]

    @property
    def layout(self) -> tuple[object, ...]:
        """See BlockSpec.layout."""
        places = tuple((slot.offset, slot.nbytes) for slot in self.slots)
        return self.weight.shape, places, self.storage.layout

    @property
    def packed(self) -> bool:
        return not self.storage.plain

    def views(self, arena: Tensor) -> list[Tensor]:
        """Its pieces in the arena (uint8)."""
        return [arena[slot.offset : slot.offset + slot.nbytes] for slot in self.slots]


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


@collector_paused()
def specs_of(
    decoder: Decoder, weights: Mapping[str, Weight], *, quantize: bool = False
) -> list[BlockSpec]:
    """Blocks of a model's weights, by canonical name: embed, layers, head."""
    return [_spec(block, weights, quantize) for block in blocks(decoder)]


def _spec(block: BlockShape, weights: Mapping[str, Weight], quantize: bool) -> BlockSpec:
    placed, end = {}, 0
    for key in block.weights:
        weight = weights[block.canonical(key)]
        storage = weight.storage
        if quantize and block.packs(key) and isinstance(storage, Floats):
            storage = MadeNf4(storage)
        placed[key], end = _place(weight, storage, end)
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


def _place(weight: Weight, storage: Storage, end: int) -> tuple[PlacedWeight, int]:
    slots: list[Slot] = []
    for piece in storage.pieces:
        slots.append(Slot(piece.source, end, piece.nbytes))
        end += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    return PlacedWeight(weight, storage, tuple(slots)), end


def decode_plainly(packed: Packed, out: Tensor) -> None:
    """In plain torch."""
    packed.decode(out)


class Block:
    """A block whose bytes have arrived in `arena` (uint8, on the compute device)."""

    def __init__(self, spec: BlockSpec, arena: Tensor, decode: Decode = decode_plainly) -> None:
        self.spec, self.arena, self._decode = spec, arena, decode
        self._packed: dict[str, Packed] = {}

    def packed(self, key: str) -> Packed:
        """A weight as it lies in the arena (views, made once)."""
        if key not in self._packed:
            placed = self.spec.weights[key]
            self._packed[key] = placed.storage.packed(placed.views(self.arena), placed.weight.shape)
        return self._packed[key]

    def stored(self, key: str) -> Tensor:
        """A float weight as it lies in the file (a view: dtype of the file)."""
        packed = self.packed(key)
        assert isinstance(packed, Values) and not self.spec.weights[key].packed
        return packed.values

    def dense(self, key: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype`, in memory of its own: `out` (same shape and dtype) if given."""
        placed = self.spec.weights[key]
        if out is None:
            out = torch.empty(placed.weight.shape, dtype=dtype, device=self.arena.device)
        if not placed.packed:
            # always a copy: the arena is reused as soon as the block is released
            return out.copy_(self.stored(key))
        self._decode(self.packed(key), out)
        return out
