"""Keys and values that generation keeps between sweeps, per trial, branch and layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.errors import Fallback
from layersweep.kv.cache import CachedStream
from layersweep.stream.pinned import HostBuffer
from layersweep.units import format_bytes

Key = tuple[int, int, int]  # (sequence, branch, layer)
Pair = tuple[Tensor, Tensor]
ALIGNMENT = 64


@dataclass
class _Kept:
    """A branch in one layer: the prefix as its arm stores it, and the exact keys (before RoPE) and
    values of the tokens since, [1, G, T, D]."""

    prefix: tuple[CachedStream, CachedStream] | None = None
    tail: Pair | None = None


class KeptCaches:
    """Caches of the trials that are generated together.

    `host_bytes`: they wait in so much host memory, pinned for a GPU if it can be, and visit the
    device with their layer; None leaves them there. What does not fit any more is pageable.
    `moved_bytes`: what has gone to a device for that.
    """

    def __init__(
        self,
        host_bytes: int | None = None,
        *,
        pin: bool = False,
        say: Callable[[Fallback], None] = lambda fallback: None,
    ) -> None:
        self.moved_bytes = 0
        self._kept: dict[Key, _Kept] = {}
        self._arena = None if host_bytes is None else HostBuffer(host_bytes)
        self._used = 0
        if self._arena and pin and not self._arena.pin():
            wanted = f"{format_bytes(self._arena.bytes.numel())} pinned"
            why = "the system pins no more; copies take about 5 times as long"
            say(Fallback("kept caches", wanted, "pageable memory", why))

    def keep_prefix(self, key: Key, streams: tuple[CachedStream, CachedStream]) -> None:
        """Both streams of one sequence, in memory of their own."""
        if self._arena:
            streams = streams[0].moved(self._to_host), streams[1].moved(self._to_host)
        self._kept[key] = _Kept(streams)

    def extend(self, key: Key, own: Pair) -> None:
        """Append a branch's own exact keys and values, which are copied."""
        kept = self._kept.setdefault(key, _Kept())
        keys, values = (x.to("cpu", copy=True) if self._arena else x.clone() for x in own)
        if kept.tail is not None:
            keys, values = (
                torch.cat(pair, dim=2) for pair in zip(kept.tail, (keys, values), strict=True)
            )
        kept.tail = keys, values

    def history(self, key: Key, device: torch.device) -> Pair:
        """Keys (before RoPE) and values of all that a branch has seen, on `device`."""
        kept = self._kept[key]
        assert kept.tail is not None

        def here(x: Tensor) -> Tensor:
            if x.device != device:
                self.moved_bytes += x.nbytes
            return x.to(device, non_blocking=True)

        tail = here(kept.tail[0]), here(kept.tail[1])
        if kept.prefix is None:
            return tail
        keys, values = (  # of a copy of the stream: what it decodes must not stay with the kept one
            torch.cat((stream.moved(here).decoded(), own), dim=2)
            for stream, own in zip(kept.prefix, tail, strict=True)
        )
        return keys, values

    def close(self) -> None:
        """Give pinned memory back, once no copy reads it."""
        self._kept.clear()
        if self._arena:
            self._arena.close()

    def _to_host(self, x: Tensor) -> Tensor:
        """A copy in the arena, waiting for it; in memory of its own where that is full."""
        assert self._arena is not None
        start, stop = self._used, self._used + x.nbytes
        if stop > self._arena.bytes.numel():
            return x.to("cpu", copy=True)
        self._used = -(-stop // ALIGNMENT) * ALIGNMENT
        held = self._arena.bytes[start:stop].view(x.dtype).view(x.shape)
        return held.copy_(x)
