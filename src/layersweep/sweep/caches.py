"""Keys and values that generation keeps between sweeps, per trial, branch and layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.kv.cache import CachedStream

Key = tuple[int, int, int]  # (sequence, branch, layer)
Pair = tuple[Tensor, Tensor]


@dataclass
class _Kept:
    """A branch in one layer: the prefix as its arm stores it, and the exact keys (before RoPE) and
    values of the tokens since, [1, G, T, D]."""

    prefix: tuple[CachedStream, CachedStream] | None = None
    tail: Pair | None = None


@dataclass
class KeptCaches:
    """`offload`: they wait in host memory and visit the device with their layer.

    `moved_bytes`: what has gone to the device for that.
    """

    offload: bool
    moved_bytes: int = 0
    _kept: dict[Key, _Kept] = field(default_factory=dict)

    def keep_prefix(self, key: Key, streams: tuple[CachedStream, CachedStream]) -> None:
        """Both streams of one sequence, in memory of their own."""
        keys, values = (stream.to("cpu") if self.offload else stream for stream in streams)
        self._kept[key] = _Kept((keys, values))

    def extend(self, key: Key, own: Pair) -> None:
        """Append a branch's own exact keys and values, which are copied."""
        kept = self._kept.setdefault(key, _Kept())
        keys, values = (x.to("cpu") if self.offload else x.clone() for x in own)
        if kept.tail is not None:
            keys, values = (
                torch.cat(pair, dim=2) for pair in zip(kept.tail, (keys, values), strict=True)
            )
        kept.tail = keys, values

    def history(self, key: Key, device: torch.device) -> Pair:
        """Keys (before RoPE) and values of all that a branch has seen, on `device`."""
        kept = self._kept[key]
        assert kept.tail is not None
        tail = [x.to(device) for x in kept.tail]
        moved = sum(x.nbytes for x in tail)
        if kept.prefix is None:
            keys, values = tail
        else:
            # a copy of the stream: what it decodes must not stay with the kept one
            here = [stream.to(device) for stream in kept.prefix]
            moved += sum(stream.held_bytes for stream in here)
            keys, values = (
                torch.cat((stream.decoded(), x), dim=2)
                for stream, x in zip(here, tail, strict=True)
            )
        if self.offload and device.type != "cpu":
            self.moved_bytes += moved
        return keys, values
