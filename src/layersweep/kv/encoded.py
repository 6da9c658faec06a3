"""The coded middle of a stream: what a codec made of it, and what helps that codec.

    x  --[ found sinks: another center ]-->  codec  -->  packed
       --[ minus what comes back of it, the newest tokens ]-->  fine codec  -->  fine

`found`   Attention sinks are coded as a difference from the first of them (kv/sinks.py).
`fine`    Queries look most at what is near. Of the newest tokens that are coded, the codec's error
          is coded again. As tokens age, that is dropped; nothing is encoded twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layersweep.kv.arms import Arm
from layersweep.kv.basis import Basis
from layersweep.kv.codec import Codec, Packed, join_batches
from layersweep.kv.means import mean_for
from layersweep.kv.sinks import FLAGS, Found, Move
from layersweep.kv.stream import Rotation, Stream


@dataclass(frozen=True, eq=False)
class Fine:
    """What a codec has left of the newest tokens, by a codec of its own."""

    codec: Codec
    packed: Packed

    def newest(self, count: int) -> Fine:
        """Of no more than `count` tokens, and nothing else held."""
        gone = max(self.packed.tokens - count, 0)
        packed = self.packed.slice_tokens(gone, self.packed.tokens)
        return replace(self, packed=packed.moved(torch.clone)) if gone else self

    def added(self, x_BHTD: Tensor, positions: Tensor) -> Tensor:
        """To what the codec made of all tokens, at `positions` [B, T]."""
        coarse = x_BHTD.shape[2] - self.packed.tokens
        left = self.codec.decode(self.packed, positions[:, coarse:])
        return torch.cat((x_BHTD[:, :, :coarse], x_BHTD[:, :, coarse:] + left), dim=2)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A packed range of tokens at `positions` [B, T], of `dtype` before and after. Arms share it:
    it is never changed, and it is itself the key to what has been made of it."""

    codec: Codec
    packed: Packed
    positions: Tensor
    basis: Basis | None
    rotation: Rotation | None
    dtype: torch.dtype
    found: Found | None = None
    fine: Fine | None = None

    def decoded(self, predicted: Tensor | None = None) -> Tensor:
        """What attention reads; `predicted` [B,H,T,D] float32, of values, is added, and of its
        tokens, the last ones, is the result."""
        x = self._decoded(0)
        if self.fine:
            x = self.fine.added(x, self.positions)
        x = self.basis.leave(x) if self.basis else x
        x = self.rotation.redo(x, self.positions) if self.rotation else x
        if predicted is None:
            return x.to(self.dtype)
        x = x[:, :, x.shape[2] - predicted.shape[2] :]
        return torch.add(x, predicted, out=torch.empty_like(x, dtype=self.dtype))

    def coarse(self, first: int) -> Tensor:
        """What stays of the tokens from `first` on, once what is fine has been dropped: values are
        predicted from that, so that it never changes."""
        x = self._decoded(first // FLAGS * FLAGS)[:, :, first % FLAGS :]
        x = self.basis.leave(x) if self.basis else x
        return _side_by_side(x, self.dtype)

    def _decoded(self, first: int) -> Tensor:
        """By the codec alone, in its coordinates; from token `first` on, a multiple of FLAGS."""
        packed, found = self.packed, self.found
        if first:
            packed = packed.slice_tokens(first, packed.tokens)
            found = found and found.without(first)
        x = self.codec.decode(packed, self.positions[:, first:])
        if found is None:
            return x
        assert packed.mean is not None
        return found.shift(x, packed.mean, -1)

    def refined(
        self, x_BHTD: Tensor, arm: Arm, stream: Stream, before: Fine | None, mean_tokens: int | None
    ) -> Encoded:
        """With what is left of its last tokens, x in the codec's coordinates; of `before` and them
        no more than the newest that the arm wants. The first `mean_tokens` of all give the mean."""
        codec = arm.fine_codec
        assert codec is not None
        tokens, more = self.packed.tokens, x_BHTD.shape[2]
        start = (tokens - more) // FLAGS * FLAGS
        left = x_BHTD - self._decoded(start)[:, :, tokens - more - start :]
        at = self.positions[:, tokens - more :]
        if before is None:
            packed = codec.encode(left, stream, at, mean_for(codec, left[:, :, :mean_tokens]))
        else:
            packed = codec.append(before.packed, left, at)
        return replace(self, fine=Fine(codec, packed).newest(arm.fine))

    def without(self, tokens: int) -> Encoded:
        """Less its first `tokens`, as views; a multiple of FLAGS where sinks are found."""
        packed = self.packed.slice_tokens(tokens, self.packed.tokens)
        return replace(
            self,
            packed=packed,
            positions=self.positions[:, tokens:],
            found=self.found and self.found.without(tokens),
            fine=self.fine and self.fine.newest(packed.tokens),
        )

    @property
    def can_be_cut(self) -> bool:
        """Not where the packed form is that of somebody's own codec."""
        return isinstance(self.packed, Packed)

    def nbytes(self, hidden: int) -> float:
        """Measured size, its first `hidden` tokens left out; by their share where they cannot be
        cut off."""
        if hidden and not self.can_be_cut:
            return self.codec.nbytes(self.packed) * (1 - hidden / self.packed.tokens)
        seen = self.packed.tokens - hidden
        packed = self.packed.slice_tokens(hidden, self.packed.tokens) if hidden else self.packed
        fine = self.fine and self.fine.newest(seen)
        return (
            self.codec.nbytes(packed)
            + (self.found.center.nbytes + len(self.found.flags) * -(-seen // FLAGS)
               if self.found else 0)
            + (fine.codec.nbytes(fine.packed) if fine else 0)
        )  # fmt: skip

    @property
    def held_bytes(self) -> int:
        """Bytes of its tensors."""
        fine = self.fine.packed.held_bytes if self.fine else 0
        return self.packed.held_bytes + fine + (self.found.nbytes if self.found else 0)

    def moved(self, move: Move) -> Encoded:
        """The bytes elsewhere. Positions and basis stay where their layer is computed."""
        return replace(
            self,
            packed=self.packed.moved(move),
            found=self.found and self.found.moved(move),
            fine=self.fine and replace(self.fine, packed=self.fine.packed.moved(move)),
        )

    def joined(self, others: Sequence[Encoded]) -> Encoded | None:
        """This one and `others` of other sequences as one batch; None where that cannot be."""
        every = (self, *others)
        packed = join_batches([one.packed for one in every])
        if packed is None or any(one.fine for one in every):
            return None
        starts = torch.cat([one.positions[:, :1] for one in every])
        at = torch.arange(packed.tokens, device=starts.device)
        parts = [one.found for one in every if one.found]
        found = Found.joined(parts) if parts else None
        return replace(self, packed=packed, positions=starts + at, found=found)


def _side_by_side(x_BHTD: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, with the heads of a token side by side in memory, where predictions take
    them."""
    if x_BHTD.dtype == dtype:
        return x_BHTD
    batch, heads, tokens, dim = x_BHTD.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=dtype, device=x_BHTD.device)
    return out.transpose(1, 2).copy_(x_BHTD)
