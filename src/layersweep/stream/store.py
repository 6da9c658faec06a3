"""The block store: hands out blocks in sweep order and reads ahead while they are used.

    file --reader pool--> host ring --copy stream--> device ring --> get(i) -> Block -> release(i)
                              |                           |
                         kept in host memory        kept on the device     (several sweeps only)

On the CPU the host ring is where blocks are computed with. A study of one sweep reads every byte
of the checkpoint once, whatever the placement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from layersweep.errors import BudgetError, Fallback
from layersweep.stream.blocks import Block, BlockSpec, Decode, decode_plainly
from layersweep.stream.device import DeviceStage, Landed
from layersweep.stream.host import Arrival, HostStage
from layersweep.stream.reader import RunReader
from layersweep.stream.runs import Placement, compute_ring, runs_of, staging_ring
from layersweep.units import format_bytes


class BlockStore:
    """Blocks of a checkpoint for one or more sweeps.

    `decode` makes packed weights dense on `device`. Fallbacks are collected in `fallbacks` and told
    to `say` as they happen. Raises BudgetError when a ring cannot hold what one layer needs.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        placement: Placement,
        device: torch.device,
        *,
        decode: Decode = decode_plainly,
        say: Callable[[Fallback], None] = lambda fallback: None,
    ) -> None:
        self.specs, self.runs, self.decode = list(specs), runs_of(specs), decode
        on_gpu = device.type == "cuda"
        _check_rings(placement, self.runs, on_gpu)
        self.fallbacks: list[Fallback] = []
        self._say = say
        self._reader = RunReader(specs)
        self._host = HostStage(self.runs, self._reader, placement, pin=on_gpu, say=self._note)
        with ExitStack() as undo:
            undo.callback(self._host.close)  # pinned memory stays so until it is told
            self._device = None
            if on_gpu:
                self._device = DeviceStage(self._host, self.runs, placement, device)
            undo.pop_all()
        self._run_of = [run.index for run in self.runs for _ in run.blocks]
        self._here: dict[int, tuple[Tensor, Arrival | Landed]] = {}
        self._left: dict[int, int] = {}  # blocks of a run that are still to be released
        self._staying: dict[int, Block] = {}  # of runs that are kept, where they are used
        self.wait_s = 0.0

    @property
    def bytes_read(self) -> int:
        """File bytes so far."""
        return self._host.bytes_read

    @property
    def h2d_bytes(self) -> int:
        return self._device.h2d_bytes if self._device else 0

    @property
    def copy_s(self) -> float:
        """Seconds that copies to the device took, by its own clock."""
        return self._device.copy_s if self._device else 0.0

    @property
    def stall_s(self) -> float:
        """Seconds that computation waited for blocks: of the compute stream on a GPU."""
        return self._device.stall_s if self._device else self.wait_s

    @property
    def host_pinned(self) -> bool:
        return self._host.pinned

    def measure_h2d(self) -> float | None:
        """Bytes per second of a copy between the two rings; None on the CPU. Between sweeps."""
        return self._device.measure() if self._device else None

    @contextmanager
    def sweep(self) -> Iterator[None]:
        """One walk over all blocks in order."""
        if self._device:
            self._device.start()
        else:
            self._host.start(skip=frozenset())
        try:
            yield
            self._reader.check_unchanged()
        finally:
            if self._device:
                self._device.stop()
            else:
                self._host.stop()
            self._here.clear()
            self._left.clear()

    def get(self, index: int) -> Block:
        """Block `index`, waiting until it is there. Raises what its reading raised."""
        run = self.runs[self._run_of[index]]
        while run.index not in self._here:
            self._take_next()
        if index in self._staying:
            return self._staying[index]
        memory, arrived = self._here[run.index]
        start = run.offsets[index - run.first]
        block = Block(
            self.specs[index], memory[start : start + self.specs[index].nbytes], self.decode
        )
        if not arrived.in_ring:
            self._staying[index] = block
        return block

    def waits_for(self, index: int) -> bool:
        """Whether the host would wait in `get` for block `index`, the next one, or might."""
        ahead = self._device is not None and self._device.has_next
        return self._run_of[index] not in self._here and not ahead

    def release(self, index: int) -> None:
        """The caller is done with block `index` in this sweep; blocks are released in order."""
        run = self._run_of[index]
        self._left[run] -= 1
        if self._left[run]:
            return
        _, arrived = self._here.pop(run)
        if isinstance(arrived, Landed):
            assert self._device is not None
            self._device.release(arrived)
        elif arrived.in_ring:
            self._host.release()

    def close(self) -> None:
        self._staying.clear()
        (self._device or self._host).close()
        self._reader.close()

    def _take_next(self) -> None:
        started = time.perf_counter()
        arrived = self._device.take() if self._device else self._host.take()
        self.wait_s += time.perf_counter() - started
        assert arrived is not None  # stop() is called by the thread that is here
        self._here[arrived.run.index] = (arrived.bytes, arrived)
        self._left[arrived.run.index] = len(arrived.run.offsets)

    def _note(self, fallback: Fallback) -> None:
        self.fallbacks.append(fallback)
        self._say(fallback)


def _check_rings(placement: Placement, runs: Sequence, on_gpu: bool) -> None:  # type: ignore[type-arg]
    """A ring that cannot hold what is used at once would wait for ever."""
    whole = sum(run.nbytes for run in runs)
    rings = [("--ram", placement.host_ring, staging_ring(runs) if on_gpu else compute_ring(runs))]
    if on_gpu and len(placement.device) < len(runs):
        rings.append(("--vram", placement.device_ring, compute_ring(runs)))
    for option, found, needed in rings:
        if found < min(needed, whole):
            raise BudgetError(
                f"{option}: the block ring has {format_bytes(found)}, needed "
                f"{format_bytes(min(needed, whole))}: one layer and two runs of blocks ahead",
                hint=f"raise {option} by {format_bytes(needed - found)}",
            )
