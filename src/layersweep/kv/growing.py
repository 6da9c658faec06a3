"""A stream that grows token by token, as generation needs it: each token is encoded exactly once.

tokens   0 ......... sink ......................... T - window ...... T
         |  exact     |  codec, appended to          |  exact, waiting |
"""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.kv.arms import Arm
from layersweep.kv.cache import keeps_exact
from layersweep.kv.codec import Packed, basis_for
from layersweep.kv.means import mean_for
from layersweep.kv.stream import Stream

MEAN_TOKENS = 128  # a channel mean comes from the first tokens that are coded, and is frozen
_EXACT_BITS = 16


class GrowingStream:
    """One stream of one layer under an arm. Everything that is read has gone through the codec,
    the newest token included, except what `@sink`, `@window`, `@pb` and 16 bits keep exact."""

    def __init__(self, arm: Arm, stream: Stream, layer: int, num_layers: int) -> None:
        self.arm, self.stream = arm, stream
        self.codec = None if keeps_exact(arm, stream, layer, num_layers) else arm.codec
        self.basis = None if self.codec is None else basis_for(self.codec, stream)
        self.packed: Packed | None = None
        self.head: Tensor | None = None
        self.tail: Tensor | None = None
        self.tokens = 0  # in all
        self.coded = 0  # in `packed`, for `batch` sequences
        self.batch = 0

    def append(self, x_BHTD: Tensor) -> None:
        """Add tokens, keys before RoPE. Raises InputError for shapes that the codec cannot take."""
        self.tokens += x_BHTD.shape[2]
        if self.codec is None:
            self.tail = _joined(self.tail, x_BHTD)
            return
        missing = self.arm.sink - (0 if self.head is None else self.head.shape[2])
        if missing > 0:
            self.head = _joined(self.head, x_BHTD[:, :, :missing])
            x_BHTD = x_BHTD[:, :, missing:]
        waiting = _joined(self.tail, x_BHTD)
        leaving = max(0, waiting.shape[2] - self.arm.window)
        if leaving:
            self._encode(waiting[:, :, :leaving])
        self.tail = waiting[:, :, leaving:]

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """What attention reads, [B, H, tokens, D]; keys still before RoPE."""
        middle = None
        if self.packed is not None:
            assert self.codec is not None
            at = self._positions(self.batch, self._first, self.coded)
            decoded = self.codec.decode(self.packed, at)
            middle = (self.basis.leave(decoded) if self.basis else decoded).to(dtype)
        parts = [part for part in (self.head, middle, self.tail) if part is not None]
        return torch.cat([part.to(dtype) for part in parts], dim=2)

    @property
    def nbits(self) -> float:
        """Measured size, exact tokens at 16 bits an element."""
        exact = sum(part.numel() for part in (self.head, self.tail) if part is not None)
        packed: float = 0
        if self.packed is not None and self.codec is not None:
            packed = self.codec.nbytes(self.packed)
        return exact * _EXACT_BITS + 8 * packed

    def _encode(self, x_BHTD: Tensor) -> None:
        assert self.codec is not None
        if self.basis:
            x_BHTD = self.basis.enter(x_BHTD)
        at = self._positions(len(x_BHTD), self._first + self.coded, x_BHTD.shape[2])
        if self.packed is None:
            mean = mean_for(self.codec, x_BHTD[:, :, :MEAN_TOKENS])
            self.packed = self.codec.encode(x_BHTD, self.stream, at, mean)
        else:
            self.packed = self.codec.append(self.packed, x_BHTD, at)
        self.batch, self.coded = len(x_BHTD), self.coded + x_BHTD.shape[2]

    @property
    def _first(self) -> int:
        """Position of the first token that went through the codec."""
        return 0 if self.head is None else self.head.shape[2]

    def _positions(self, batch: int, first: int, count: int) -> Tensor:
        return torch.arange(first, first + count).expand(batch, count)


def _joined(before: Tensor | None, x: Tensor) -> Tensor:
    return x if before is None or not before.shape[2] else torch.cat((before, x), dim=2)
