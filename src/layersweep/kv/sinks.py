"""`found`: attention sinks, wherever they stand in the text.

They are alike: small keys, values of nearly zero, far from the mean of all other tokens. A token
that is nearer to the first token of the text than to the mean is coded as a difference from that
token, for one bit a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows

if TYPE_CHECKING:
    from layersweep.kernels import Kernels

Move = Callable[[Tensor], Tensor]

FLAGS = 8  # tokens whose bits share a byte


@dataclass(frozen=True, eq=False)
class Found:
    """Which tokens are nearer to `center` [B,H,1,D] float16 than to the mean: `flags`
    [B, T / 8 rounded up] uint8, a bit each. Means are [B,H,D] float16, perhaps with a level."""

    center: Tensor
    flags: Tensor

    @classmethod
    def of(cls, x_BHTD: Tensor, center: Tensor, mean: Tensor) -> Found:
        kernels = _kernels_for(x_BHTD)
        find = kernels.find_sinks if kernels else flags_by_torch
        return cls(center, find(x_BHTD, center, mean))

    def shift(self, x_BHTD: Tensor, mean: Tensor, sign: int) -> Tensor:
        """Found tokens from around the center to around the mean (sign 1), or back (-1). Memory of
        x, float32, may be that of the result."""
        if kernels := _kernels_for(x_BHTD):
            kernels.shift_sinks_(x_BHTD, self.center, mean, self.flags, sign)
            return x_BHTD
        return self.shift_by_torch(x_BHTD, mean, sign)

    def shift_by_torch(self, x_BHTD: Tensor, mean: Tensor, sign: int) -> Tensor:
        near = _unpacked(self.flags, x_BHTD.shape[2])[:, None, :, None]
        return torch.where(near, x_BHTD + sign * (_row(mean, x_BHTD) - self.center.float()), x_BHTD)

    def followed(self, tokens: int, more: Found, count: int) -> Found:
        """Of `tokens` tokens and the `count` of `more` after them."""
        both = [_unpacked(self.flags, tokens), _unpacked(more.flags, count)]
        return replace(self, flags=_packed(torch.cat(both, dim=1)))

    def without(self, tokens: int) -> Found:
        """Less its first `tokens`, a multiple of FLAGS."""
        assert tokens % FLAGS == 0
        return replace(self, flags=self.flags[:, tokens // FLAGS :])

    def moved(self, move: Move) -> Found:
        return Found(move(self.center), move(self.flags))

    @staticmethod
    def joined(parts: Sequence[Found]) -> Found:
        longest = max(part.flags.shape[1] for part in parts)
        flags = [part.flags for part in parts]
        padded = [torch.nn.functional.pad(one, (0, longest - one.shape[1])) for one in flags]
        return Found(torch.cat([part.center for part in parts]), torch.cat(padded))

    @property
    def nbytes(self) -> int:
        return self.center.nbytes + self.flags.nbytes


def flags_by_torch(x_BHTD: Tensor, center: Tensor, mean: Tensor) -> Tensor:
    """Flags of the tokens that are nearer to the center. Sums are added in a fixed tree: which
    tokens are found depends on nothing but them."""
    near, usual = center.float(), _row(mean, x_BHTD)
    between = (usual.square() - near.square()).transpose(1, 2).flatten(2)
    along = (x_BHTD.float() * (usual - near)).transpose(1, 2).flatten(2)  # [B, T, H D]
    return _packed(2 * add_rows(along, dim=2) < add_rows(between, dim=2))


def _row(mean: Tensor, like_BHTD: Tensor) -> Tensor:
    """The mean without its level, float32 [B,H,1,D]."""
    return mean[:, :, None, : like_BHTD.shape[3]].float()


def _packed(flags_BT: Tensor) -> Tensor:
    tokens = flags_BT.shape[1]
    padded = torch.nn.functional.pad(flags_BT.to(torch.uint8), (0, -tokens % FLAGS))
    return pack_bits(padded.t().contiguous(), 1).contiguous()  # for one bit it is a view


def _unpacked(flags: Tensor, tokens: int) -> Tensor:
    """[B, tokens] bool."""
    return unpack_bits(flags.contiguous(), 1)[:tokens].t().bool()


def _kernels_for(x_BHTD: Tensor) -> Kernels | None:
    if x_BHTD.device.type != "cuda":
        return None
    from layersweep.kernels.codecs import MAX_TOKEN

    # kernels for float32 input are part of every module: one less to compile
    dtype = torch.float16 if x_BHTD.dtype == torch.float32 else x_BHTD.dtype
    fits = x_BHTD.stride(3) == 1 and x_BHTD.shape[1] * x_BHTD.shape[3] <= MAX_TOKEN
    return _kernels(x_BHTD.device, dtype) if fits else None


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """CUDA kernels, equal to torch bit for bit; None: there are none. The engine says elsewhere
    that they are missing. A refusal is remembered, too."""
    from layersweep.kernels import KernelError, load_kernels

    try:
        kernels = load_kernels(device, dtype)
        kernels.compile_sinks()
    except KernelError:
        return None
    return kernels
