"""Dense weights in the compute dtype: one buffer, filled anew for every block that is used, or
memory that keeps all of them, where many walks follow and it has room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape
from layersweep.kernels.weights import Alike
from layersweep.model.compute import Compute
from layersweep.model.ops import CudaOps
from layersweep.stream.blocks import Block, BlockSpec
from layersweep.stream.shapes import (
    VECTOR_ALIGNMENT,
    dense_bytes,
    dense_elements,
    dense_places,
    slots,
)

# Matrices that have the same rows as input are one product: they lie side by side.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}
Views = Mapping[str, Tensor]


class DenseWeights:
    """One layer's attention weights and those of an MLP or a few experts, or the head's, in one
    buffer.

    `attention`, `feeds` and `head` are views by key, those of JOINED besides those of the block:
    qkv_proj [(Q + 2G) D, H], gate_up_proj [2I, H]. Those of `feeds` have a dimension in front, for
    an MLP (1) or the experts that are dense together. Filling is ordered with the products on the
    stream, so the buffer is reused at once. `keeps`: each block has memory of its own instead, and
    is decoded once.
    """

    def __init__(self, decoder: Decoder, compute: Compute, *, keeps: bool = False) -> None:
        self._kept: dict[int, Views] | None = {} if keeps else None  # by the first block's number
        element = compute.dtype.itemsize
        count = dense_bytes(decoder, element, cpu=compute.cpu) // element
        self._memory = torch.empty(count, dtype=compute.dtype, device=compute.device)
        self._ops = compute.ops
        self._table = decoder.vocab_size, decoder.hidden_size
        self._known: dict[tuple[object, ...], Views] = {}
        self._stacks: dict[tuple[object, ...], Views] = {}
        self._attention_starts = 0
        self.attention: Views = {}
        self.feeds: Views = {}
        self.head: Views = {}

    def reuse(self, spec: BlockSpec) -> bool:
        """Take what is kept of a block, or of the group that it begins; False where nothing is."""
        if self._kept is None or (found := self._kept.get(id(spec))) is None:
            return False
        if spec.role == "attention":
            self.attention = found
        elif spec.role == "head":
            self.head = found
        else:
            self.feeds = found
        return True

    @property
    def keeps(self) -> bool:
        """Whether a block that was filled once stays so."""
        return self._kept is not None

    def fill_attention(
        self, block: Block, feeds: Iterable[BlockShape], experts_at_once: int = 1
    ) -> None:
        """Of a new layer, which the blocks `feeds` belong to, too."""
        if self._kept is None:
            sizes = [self._size(feed) * slots(feed, experts_at_once) for feed in feeds]
            self._attention_starts = max(sizes, default=0)
        self.attention = self._filled(block, self._attention_starts)

    def fill_feeds(self, blocks: Sequence[Block]) -> None:
        """An MLP of the layer, or experts, which lie side by side at equal distances."""
        shape = blocks[0].spec.shape
        step = self._size(shape)
        if self._kept is not None:
            self.feeds = self._kept_feeds(blocks, step)
            return
        each = [self._at(block.spec.shape, slot * step) for slot, block in enumerate(blocks)]
        self.feeds = self._stacked(shape, len(blocks))
        together = self._decoded_together(blocks, each[0], step)
        for block, views in zip(blocks, each, strict=True):
            self._fill(block, views, together)

    def _decoded_together(self, blocks: Sequence[Block], views: Views, step: int) -> frozenset[str]:
        """Decode, each in one launch, the weights of several experts that lie alike in all; their
        keys. They are small: launches take the host longer than the device. `views`: of the
        first."""
        first, ops = blocks[0], self._ops
        layout = first.spec.layout
        if len(blocks) == 1 or not isinstance(ops, CudaOps):
            return frozenset()
        if any(block.spec.layout != layout for block in blocks):
            return frozenset()
        start = first.arena.data_ptr()
        shifts, done = [block.arena.data_ptr() - start for block in blocks], set()
        for key, placed in first.spec.weights.items():
            if not placed.packed or views[key].dtype != self._memory.dtype:
                continue
            offsets = [block.spec.weights[key].storage.offset for block in blocks]
            alike = Alike(shifts, offsets, step)
            if ops.decode_alike(first.packed(key), views[key], alike):
                done.add(key)
        return frozenset(done)

    def _size(self, block: BlockShape) -> int:
        return dense_elements(block, self._memory.itemsize)

    def fill_head(self, block: Block) -> None:
        """Takes the place of everything else."""
        self.head = self._filled(block, 0)

    def embedding(self, block: Block) -> Tensor:
        """The table [V, H]: as stored where it is float, else decoded into the buffer."""
        if not block.spec.weights["embed"].packed:
            return block.stored("embed")
        out = self._memory[: math.prod(self._table)].view(self._table)
        return block.dense("embed", self._memory.dtype, out=out)

    def _filled(self, block: Block, start: int) -> Views:
        if self._kept is None:
            views = self._at(block.spec.shape, start)
        else:
            memory = self._memory.new_empty(self._size(block.spec.shape))
            views = self._kept[id(block.spec)] = _views(block.spec.shape, memory)
        self._fill(block, views)
        return views

    def _kept_feeds(self, blocks: Sequence[Block], step: int) -> Views:
        assert self._kept is not None
        first = blocks[0].spec
        memory = self._memory.new_empty(step * len(blocks))
        for slot, block in enumerate(blocks):
            self._fill(block, _views(first.shape, memory[slot * step :]))
        views = _stacked(_views(first.shape, memory), len(blocks), step, memory.itemsize)
        self._kept[id(first)] = views
        return views

    def _at(self, shape: BlockShape, start: int) -> Views:
        at = (start, shape.float32, *shape.weights.items())
        if at not in self._known:
            self._known[at] = _views(shape, self._memory, start)
        return self._known[at]

    def _stacked(self, shape: BlockShape, count: int) -> Views:
        """The first of `count` equal blocks from the buffer's start on, and its like behind it."""
        at = (count, shape.float32, *shape.weights.items())
        if at not in self._stacks:
            step, element = self._size(shape), self._memory.itemsize
            self._stacks[at] = _stacked(self._at(shape, 0), count, step, element)
        return self._stacks[at]

    def _fill(self, block: Block, views: Views, done: frozenset[str] = frozenset()) -> None:
        """The weights of a block but for those that are `done`."""
        for key in block.spec.shape.weights:
            if key in done:
                continue
            view, dtype = views[key], self._memory.dtype
            if view.dtype != dtype and block.spec.weights[key].packed:
                view.copy_(block.dense(key, dtype))  # kernels decode to the compute dtype alone
            else:
                block.dense(key, view.dtype, out=view)


def _stacked(views: Views, count: int, step: int, element: int) -> Views:
    """Of the first of `count` equal blocks, and its like at every further `step` elements of
    `element` bytes."""
    step *= element
    return {
        key: view.as_strided((count, *view.shape), (step // view.itemsize, *view.stride()))
        for key, view in views.items()
    }


def _views(block: BlockShape, memory: Tensor, start: int = 0) -> Views:
    """The weights of a block in `memory` from element `start` on."""
    views: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    shapes = block.weights
    for key, shape in shapes.items():
        if not any(key in keys[1:] for keys in JOINED.values()):
            start = -(-start // VECTOR_ALIGNMENT) * VECTOR_ALIGNMENT
        places[key], end = start, start + dense_places(block, key, memory.itemsize)
        dtype = torch.float32 if key in block.float32 else memory.dtype
        views[key], start = memory[start:end].view(dtype).view(shape), end
    for joined, keys in JOINED.items():
        if all(key in views for key in keys):
            rows, rest = sum(len(views[key]) for key in keys), shapes[keys[0]][1:]
            first = places[keys[0]]
            joint = memory[first : first + rows * math.prod(rest)]
            views[joined] = joint.view(rows, *rest)
    return views
