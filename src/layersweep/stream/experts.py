"""Routed experts, fetched by id once routing has chosen them, where walks use few of them.

    file --readers--> home (host memory, pinned) --copy stream--> slot (where it is computed with)

Slots are equal and belong to nobody: an expert takes the slot of the one that is least worth
keeping. Worth is how often it was used of late; of equal ones the one that was used last goes,
whose next use is farthest, since layers are visited in order. So walks that use all experts keep a
fixed share of them, and walks that use few keep those that their text likes. Nothing is written
back.

On the CPU slots are host memory and there is no home.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.errors import Fallback
from layersweep.families.weights import BlockShape
from layersweep.stream.blocks import Block, BlockSpec, Decode
from layersweep.stream.events import mark, seconds_between
from layersweep.stream.pinned import HostBuffer
from layersweep.stream.reader import RunReader
from layersweep.stream.runs import Run
from layersweep.units import format_bytes

DECAY = 0.998  # of an expert's worth with every walk: half of it is of the last 350
READERS = 8
Key = int  # an expert's number among the blocks that are given


@dataclass
class _Slot:
    """`filled`: what fills it has been started. On a GPU, `arriving` happens once its bytes are
    there, `done` once nobody reads them any more."""

    memory: Tensor
    filled: bool = False
    arriving: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None


@dataclass
class Traffic:
    """Of all visits: experts that were there, and that were not."""

    hits: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float | None:
        seen = self.hits + self.misses
        return self.hits / seen if seen else None


class ExpertStore:
    """Experts of all layers in `slots` places on `device`.

    `specs`: their blocks in sweep order, equal in size within a layer. `home_bytes`: host memory
    for those that have been read, on a GPU; what it does not hold is read from its file again.
    """

    def __init__(
        self, specs: Sequence[BlockSpec], slots: int, device: torch.device, *, decode: Decode,
        home_bytes: int = 0, say: Callable[[Fallback], None] = lambda fallback: None,
    ) -> None:  # fmt: skip
        self.specs, self.device, self.traffic = list(specs), device, Traffic()
        self._decode, self._say = decode, say
        self._on_gpu = device.type == "cuda"
        self.of_layer: dict[int | None, list[Key]] = {}
        for key, spec in enumerate(self.specs):
            self.of_layer.setdefault(spec.layer, []).append(key)
        size = slot_bytes(specs)
        memory = torch.empty(slots, size, dtype=torch.uint8, device=device)
        self._free = deque(_Slot(row) for row in memory)
        self._slots: dict[Key, _Slot] = {}
        self._blocks: dict[Key, Block] = {}
        self._reading: dict[Key, list[Future[int]]] = {}
        self._worth = [0.0] * len(self.specs)
        self._used_at = [0] * len(self.specs)
        self._clock = 0
        self._needed: dict[Key, None] = {}  # in the order of their use
        self._queue: deque[Key] = deque()
        self._reader = RunReader(self.specs)
        self._pool = ThreadPoolExecutor(READERS, "expert-reader")
        self._home = _Home(self.specs, home_bytes if self._on_gpu else 0, say)
        self._staging = HostBuffer(size) if self._on_gpu else None
        self._stream: torch.cuda.Stream | None = None
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.bytes_read = self.h2d_bytes = 0
        self.stall_s = 0.0

    def begin(self) -> None:
        """A walk starts: what was used long ago is worth less."""
        self._worth = [worth * DECAY for worth in self._worth]

    def end(self) -> None:
        """A walk is over: nothing is wanted any more."""
        self._queue.clear()
        self._needed.clear()
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
            self.stall_s += seconds_between(self._waits)
            self._waits.clear()

    def want(self, keys: Sequence[Key]) -> None:
        """They will be used soon, in this order: copies of those that are not there begin as far
        as slots can be had."""
        for key in keys:
            if key not in self._needed:
                self._needed[key] = None
                if key not in self._slots:
                    self._queue.append(key)
        self._fetch()

    def shapes(self, layer: int) -> list[BlockShape]:
        """Of the layer's experts; none in a layer that routes nothing."""
        return [self.specs[key].shape for key in self.of_layer.get(layer, [])]

    def chosen(self, layer: int, used: Collection[int]) -> list[Key]:
        """The layer's experts that are used, in order."""
        return [key for key in self.of_layer[layer] if self.specs[key].expert in used]

    def visit(self, keys: Sequence[Key], at_once: int) -> Iterator[list[Block]]:
        """Blocks of `keys`, in order, `at_once` together. They are read until the next ones are
        asked for."""
        at_once = min(at_once, len(self._free) + len(self._slots))
        for key in keys:
            here = key in self._slots
            self.traffic.hits += here
            self.traffic.misses += not here
        self.want(keys)
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            yield [self._get(key, some) for key in some]
            for key in some:
                self._release(key)
            self._fetch()

    def close(self) -> None:
        self._pool.shutdown()
        self._blocks.clear()
        self._slots.clear()
        self._free.clear()
        self._home.close()
        if self._staging is not None:
            self._staging.close()
        self._reader.close()

    # -- slots ---------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """Begin what waits, while there are slots for it."""
        while self._queue:
            slot = self._take_slot()
            if slot is None:
                return
            self._begin(self._queue.popleft(), slot)

    def _take_slot(self) -> _Slot | None:
        """A free one, or that of the expert that is least worth keeping; None if all are needed."""
        if self._free:
            return self._free.popleft()
        others = [key for key in self._slots if key not in self._needed]
        if not others:
            return None
        return self._taken_from(
            min(others, key=lambda key: (self._worth[key], -self._used_at[key]))
        )

    def _taken_from(self, key: Key) -> _Slot:
        self._blocks.pop(key, None)
        if key in self._reading:  # it was wanted, and is not
            self._finish(key, self._reading.pop(key), self._memory(key))
            self._home.keep(key)
        slot = self._slots.pop(key)
        slot.filled, slot.arriving = False, None
        return slot

    def _get(self, key: Key, group: Sequence[Key]) -> Block:
        """A block of a group that is used together."""
        if key not in self._slots:
            self._fetch()
        if key not in self._slots:  # what is needed last makes room
            last = next(k for k in reversed(self._needed) if k in self._slots and k not in group)
            self._queue.remove(key)
            self._begin(key, self._taken_from(last))
            self._queue.append(last)
        slot = self._slots[key]
        self._arrive(key, slot)
        if slot.arriving is not None:
            begun = mark(self.device)
            torch.cuda.current_stream(self.device).wait_event(slot.arriving)
            self._waits.append((begun, mark(self.device)))
            slot.arriving = None
        if key not in self._blocks:
            spec = self.specs[key]
            self._blocks[key] = Block(spec, slot.memory[: spec.nbytes], self._decode)
        return self._blocks[key]

    def _release(self, key: Key) -> None:
        self._clock += 1
        self._worth[key] += 1.0
        self._used_at[key] = self._clock
        self._needed.pop(key, None)
        if self._on_gpu:
            self._slots[key].done = mark(self.device, timed=False)

    # -- bytes ---------------------------------------------------------------------------------

    def _begin(self, key: Key, slot: _Slot) -> None:
        """Start what brings an expert to its slot: a copy from home, or the reading of its file."""
        self._slots[key] = slot
        target = slot.memory[: self.specs[key].nbytes]
        if not self._on_gpu:
            self._reading[key] = self._read(key, target)
            slot.filled = True
            return
        home = self._home.of(key)
        if home is not None and self._home.has(key):
            self._copy(key, home, slot)
        elif home is not None:
            self._reading[key] = self._read(key, home)

    def _arrive(self, key: Key, slot: _Slot) -> None:
        """Wait for the reading of a file; on a GPU, its copy follows."""
        if key in self._reading:
            memory = self._memory(key)
            self._finish(key, self._reading.pop(key), memory)
            if self._on_gpu:
                self._home.keep(key)
                self._copy(key, memory, slot)
        elif not slot.filled:  # it has no home: read and copied when its turn is there
            assert self._staging is not None
            staged = self._staging.bytes[: self.specs[key].nbytes]
            self._finish(key, self._read(key, staged), staged)
            self._copy(key, staged, slot)
            assert slot.arriving is not None
            slot.arriving.synchronize()  # the staging memory is the next one's

    def _memory(self, key: Key) -> Tensor:
        """Where its file is read to."""
        memory = self._home.of(key) if self._on_gpu else self._slots[key].memory
        assert memory is not None
        return memory[: self.specs[key].nbytes]

    def _read(self, key: Key, target: Tensor) -> list[Future[int]]:
        tasks = self._reader.tasks(self._run(key), target)
        return [self._pool.submit(task) for task in tasks]

    def _finish(self, key: Key, reads: list[Future[int]], memory: Tensor) -> None:
        wait(reads)
        for read in reads:
            read.result()
        self._reader.check(self._run(key), memory)
        self.bytes_read += self.specs[key].stored_bytes

    def _run(self, key: Key) -> Run:
        spec = self.specs[key]
        return Run(key, spec.layer, key, (0,), spec.nbytes, spec.stored_bytes)

    def _copy(self, key: Key, source: Tensor, slot: _Slot) -> None:
        """On the copy stream, once nobody reads what the slot had."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            if slot.done is not None:
                self._stream.wait_event(slot.done)
            slot.memory[: len(source)].copy_(source, non_blocking=True)
            slot.filled, slot.arriving = True, mark(self.device)
        self.h2d_bytes += len(source)


class _Home:
    """Host memory of experts, a piece per layer, pinned as it is filled for the first time."""

    def __init__(
        self, specs: Sequence[BlockSpec], nbytes: int, say: Callable[[Fallback], None]
    ) -> None:
        self._say, self._pins = say, True
        self._places: dict[Key, tuple[int | None, int]] = {}
        self._sizes: dict[int | None, int] = {}
        self._buffers: dict[int | None, HostBuffer] = {}
        self._kept: set[Key] = set()
        used = 0
        for key, spec in enumerate(specs):
            if used + spec.nbytes <= nbytes:
                start = self._sizes.get(spec.layer, 0)
                self._places[key] = spec.layer, start
                self._sizes[spec.layer] = start + spec.nbytes
                used += spec.nbytes
        self._lengths = {key: specs[key].nbytes for key in self._places}

    def of(self, key: Key) -> Tensor | None:
        """An expert's memory; None where there is no room for it."""
        if key not in self._places:
            return None
        layer, start = self._places[key]
        if layer not in self._buffers:
            self._buffers[layer] = self._opened(self._sizes[layer])
        return self._buffers[layer].bytes[start : start + self._lengths[key]]

    def _opened(self, nbytes: int) -> HostBuffer:
        buffer = HostBuffer(nbytes)
        buffer.touch()
        if self._pins and not buffer.pin():
            self._pins = False
            done = sum(one.bytes.numel() for one in self._buffers.values())
            why = f"the system pins no more than {format_bytes(done)}; copies are slower"
            self._say(Fallback("host store of experts", "pinned", "pageable memory", why))
        return buffer

    def has(self, key: Key) -> bool:
        """Whether it has been read."""
        return key in self._kept

    def keep(self, key: Key) -> None:
        self._kept.add(key)

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()


def slot_bytes(specs: Sequence[BlockSpec]) -> int:
    """Of a place that any of these experts fits, aligned as arenas are."""
    return max(-(-spec.nbytes // 256) * 256 for spec in specs)
