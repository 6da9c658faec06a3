"""The block store: hands out blocks in sweep order and reads ahead while they are used.

One reader thread walks the sweep order. A resident block is read once, in the first sweep,
and stays; every other block goes through the ring, a bounded number of bytes that its
release gives back. A study of one sweep therefore reads every byte of the checkpoint once,
whatever the placement.

    reader thread:  file -> ring arena ... (waits while the ring is full)
    compute thread: get(i) -> Block -> release(i)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from layersweep.errors import BudgetError
from layersweep.stream.blocks import Block, BlockReader, BlockSpec
from layersweep.units import format_bytes


def choose_resident(specs: Sequence[BlockSpec], resident_bytes: int) -> frozenset[int]:
    """The first blocks in sweep order that fit `resident_bytes`: a pure function."""
    chosen, used = set(), 0
    for index, spec in enumerate(specs):
        if used + spec.nbytes <= resident_bytes:
            chosen.add(index)
            used += spec.nbytes
    return frozenset(chosen)


def minimum_ring(specs: Sequence[BlockSpec]) -> int:
    """Bytes that a sweep needs in flight: one whole layer in use and the next two blocks."""
    layers: dict[int, int] = {}
    for spec in specs:
        if spec.layer is not None:
            layers[spec.layer] = layers.get(spec.layer, 0) + spec.nbytes
    return max(layers.values()) + 2 * max(spec.nbytes for spec in specs)


class BlockStore:
    """Blocks of a checkpoint for one or more sweeps.

    `resident_bytes` of blocks are kept after their first read; `ring_bytes` bounds the rest.
    `bytes_read` counts file bytes, `wait_s` the time that compute waited for a block.
    Raises BudgetError when the ring cannot hold what one layer needs.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        *,
        resident_bytes: int,
        ring_bytes: int,
        device: torch.device,
    ) -> None:
        self.specs, self.device = list(specs), device
        self.resident = choose_resident(specs, resident_bytes)
        needed = minimum_ring(specs)
        if len(self.resident) < len(self.specs) and ring_bytes < needed:
            raise BudgetError(
                f"the block ring has {format_bytes(ring_bytes)}, needed {format_bytes(needed)}: "
                "one layer and two blocks ahead",
                hint=f"raise --ram by {format_bytes(needed - ring_bytes)}",
            )
        self.ring_bytes = ring_bytes
        self._reader = BlockReader()
        self._kept: dict[int, Block] = {}
        self._ready: dict[int, Block] = {}
        self._spare: dict[int, list[Tensor]] = {}
        self._in_ring = 0
        self._changed = threading.Condition()
        self._stop = False
        self._failure: BaseException | None = None
        self.wait_s = 0.0

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    @contextmanager
    def sweep(self) -> Iterator[None]:
        """One walk over all blocks in order; the reader thread lives as long as it."""
        self._stop, self._failure = False, None
        thread = threading.Thread(target=self._read_ahead, name="block-reader", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._stop = True
                self._changed.notify_all()
            thread.join()
            self._ready.clear()
            self._spare.clear()
            self._in_ring = 0

    def get(self, index: int) -> Block:
        """Block `index`, waiting until it has been read. Raises what the reader raised."""
        started = time.perf_counter()
        with self._changed:
            while index not in self._ready:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
            self.wait_s += time.perf_counter() - started
            return self._ready[index]

    def release(self, index: int) -> None:
        """The caller is done with block `index` in this sweep; its ring bytes are free again."""
        with self._changed:
            block = self._ready.pop(index)
            if index not in self.resident:
                self._in_ring -= block.spec.nbytes
                if self.device.type == "cpu":  # elsewhere the arena lies on the device
                    self._spare.setdefault(block.spec.nbytes, []).append(block.arena)
                self._changed.notify_all()

    def close(self) -> None:
        self._kept.clear()
        self._reader.close()

    def _read_ahead(self) -> None:
        try:
            for index, spec in enumerate(self.specs):
                arena = self._take_arena(index, spec)
                if arena is None:
                    return
                if index not in self._kept:
                    self._reader.read(spec, arena)
                block = self._kept.get(index) or Block(spec, arena.to(self.device))
                with self._changed:
                    if index in self.resident:
                        self._kept[index] = block
                    self._ready[index] = block
                    self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _take_arena(self, index: int, spec: BlockSpec) -> Tensor | None:
        """Memory for the next block; None once the sweep was left."""
        if index in self._kept:
            return None if self._stop else self._kept[index].arena
        if index in self.resident:
            return torch.empty(spec.nbytes, dtype=torch.uint8)
        with self._changed:
            while self._in_ring + spec.nbytes > self.ring_bytes and not self._stop:
                self._changed.wait()
            if self._stop:
                return None
            self._in_ring += spec.nbytes
            spare = self._spare.get(spec.nbytes)
            if spare:
                return spare.pop()
            self._drop_spares(self.ring_bytes - self._in_ring)
        return torch.empty(spec.nbytes, dtype=torch.uint8)

    def _drop_spares(self, room: int) -> None:
        """Give back released arenas of other sizes until those left fit `room`."""
        held = sum(size * len(arenas) for size, arenas in self._spare.items())
        for size, arenas in self._spare.items():
            while arenas and held > room:
                arenas.pop()
                held -= size
