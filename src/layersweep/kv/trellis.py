"""`trellis`: channel mean, random rotation, 8-bit scale, a tail-biting bitshift trellis code.

Per head vector x of size D, with the channel mean m [D] and the level l of its sequence and head:
    y = rotate(x - m)              nearly Gaussian, whatever x was
    u = g y / [g rms(y)]           [ ] rounds to one byte, relative to l; u has an rms close to 1
    b = the D symbols of `bits` bits whose levels c, all together, lie nearest to u
    s = [<y, y> / <y, c>]          so that <x - m, x^ - m> = <x - m, x - m>, up to the rounding
    x^ = m + rotate_back(s c)
Element t has the level TABLE[s_t], s_t the last L bits of the stream of symbols at t: every level
serves several neighbours, so D bits buy a code of D dimensions. The stream is a ring, hence exactly
`bits` per element and no state to store. Levels are trained (tools/make_trellis_tables.py), and
centroids: c is shorter than u, and without the gain in s scores flatten and sums of values shrink.
The gain is g = 1 / (1 - distortion) on average, so that [g rms(y)] is s, or close to it: where
codes are fine, rounding the scale costs nothing, because u was divided by what is stored.

What a byte of scale stands for: kv/trellis_scale.py. A vector of scale 0 is its mean.

Bits per element: bits + 8 / D + 16 (D + 1) / (D T), T the tokens that share mean and level. Without
a mean, or with one of D columns, the level is 1.

Sources: bitshift trellis and tail-biting by two passes, QTIP (arXiv 2406.11235); trellis coded
quantization, Marcellin and Fischer (1990).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.codec import Codec, Packed, role_bits
from layersweep.kv.identity import Identity
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows, rotate, rotate_back, rotation_weights, row_chunks
from layersweep.kv.stream import Stream
from layersweep.kv.trellis_scale import (
    NOT_A_NUMBER,
    inverse_scales,
    reached,
    scale_thresholds,
    scale_values,
    square_thresholds,
)
from layersweep.kv.trellis_search import encoder_name, search, states_of
from layersweep.kv.vector_codec import VectorCodec

if TYPE_CHECKING:
    from layersweep.kernels import Kernels

TABLES = Path(__file__).with_name("trellis_tables.safetensors")
# Vectors searched at a time x states: torch keeps a byte per vector, element and group of states.
_SEARCH_STATES = 2**22


@dataclass(frozen=True)
class Code:
    """A trellis of 2^window states and its trained levels."""

    window: int
    bits: int

    def levels(self, device: torch.device) -> Tensor:
        """float32 [2^window]."""
        return _on_device(f"levels.{self.window}.{self.bits}", device)

    @property
    def trained(self) -> bool:
        return f"levels.{self.window}.{self.bits}" in _tables()

    @property
    def gain(self) -> float:
        """1 / (1 - distortion)."""
        return 1 / (1 - _tables()[f"distortion.{self.window}.{self.bits}"].item())


@dataclass(frozen=True)
class Trellis(VectorCodec):
    """See the module's text. `states`: of the trellis; more of them cost time and gain quality.
    `fit`: "1" where coordinates come from a text (kv/fit.py), not from weights (kv/basis.py).
    `found`: whether attention sinks are coded around the first token (kv.encoded)."""

    key_bits: int
    value_bits: int
    states: str = "256"
    fit: str = "0"
    found: str = "0"

    method = "trellis"
    version = "2"
    wants_mean = True
    wants_level = True
    wants_basis = True

    @property
    def encoder(self) -> str:
        return encoder_name()

    def encoder_on(self, device: torch.device) -> str:
        """What searches there: "cuda", "numba", or "torch", which is far slower than both."""
        if device.type == "cpu":
            return encoder_name()
        codes = [self._code(bits) for bits in (self.key_bits, self.value_bits) if bits < 16]
        found = all(_kernels(device, torch.float16, code) for code in codes)
        return "cuda" if found else "torch"

    def check(self, stream: Stream) -> None:
        code = self._code(role_bits(self, stream))
        if not code.trained:
            raise InputError(
                f"trellis: found {code.bits} bits with states={self.states}, needed at most 4 bits",
                hint="leave @states out: 5, 6 and 8 bits have 256",
            )
        if stream.dim * code.bits < code.window:
            raise InputError(
                f"trellis: stream '{stream.name}' has {stream.dim} x {code.bits} bits, needed at "
                f"least the {code.window} of a state",
                hint="more bits, or fewer states",
            )

    def _code(self, bits: int) -> Code:
        return Code(int(self.states).bit_length() - 1, bits)

    def encode_all(
        self, x_BHTD: Tensor, bits: int, mean: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        code = self._code(bits)
        # Kernels for float32 input are part of every module: one less to compile.
        dtype = torch.float16 if x_BHTD.dtype == torch.float32 else x_BHTD.dtype
        if kernels := _kernels(x_BHTD.device, dtype, code, x_BHTD.shape[3]):
            return _encode_by_kernels(kernels, x_BHTD, code, mean)
        return _encode_by_torch(x_BHTD, code, mean)

    def decode_all(self, packed: Packed) -> Tensor:
        (codes, scale), dim, device = packed.rows(), packed.dim, packed.codes.device
        assert scale is not None
        code = self._code(packed.bits)
        means = None if packed.mean is None else _mean_rows(packed.mean, dim)
        out = torch.empty(len(codes), dim, dtype=torch.float32, device=device)
        if kernels := _kernels(device, torch.float16, code, dim):  # any T: the output is float32
            kernels.trellis_decode(
                codes.contiguous(),
                scale.contiguous(),
                means,
                code.bits,
                code.levels(device),
                scale_values(device),
                rotation_weights(dim, True, device).view(-1),
                out,
            )
            return out
        factor = scale_values(device)[scale.int()] * _levels_of(means, len(codes), device)
        for rows in row_chunks(len(codes), dim, device):
            out[rows] = _decode_rows(codes[rows], factor[rows], code)
        if means is not None:
            out.view(len(means), len(out) // len(means), dim).add_(means[:, None, :dim].float())
        return out

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=True, wants_basis=True)


def _mean_rows(mean: Tensor, dim: int) -> Tensor:
    """mean [B, H, D or D + 1] -> [B H, D + 1], the level 1 where there is none."""
    if mean.shape[2] == dim:
        mean = torch.cat((mean, torch.ones_like(mean[..., :1])), dim=-1)
    return mean.reshape(-1, dim + 1)


def _levels_of(means: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Level of each of `count` vectors, float32."""
    if means is None:
        return torch.ones(count, dtype=torch.float32, device=device)
    return means[:, -1].float().repeat_interleave(count // len(means), output_size=count)


def _encode_by_torch(x: Tensor, code: Code, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] -> codes [B H T, D bits / 8] uint8, scale [B H T] uint8."""
    dim, device = x.shape[3], x.device
    means = None if mean is None else _mean_rows(mean, dim)
    flat = (x if mean is None else x.float() - mean[..., :dim].float().unsqueeze(2)).reshape(
        -1, dim
    )
    level = _levels_of(means, len(flat), device)
    codes = torch.empty(len(flat), dim * code.bits // 8, dtype=torch.uint8, device=device)
    scale = torch.empty(len(flat), dtype=torch.uint8, device=device)
    step = _SEARCH_STATES >> code.window
    for start in range(0, len(flat), step):
        piece, its_level = flat[start : start + step], level[start : start + step]
        u_DN = torch.empty(dim, len(piece), dtype=torch.float32, device=device)
        size = torch.empty(len(piece), dtype=torch.float32, device=device)
        chunks = list(row_chunks(len(piece), dim, device))
        for rows in chunks:
            u_DN[:, rows], size[rows] = _scale_rows(piece[rows], its_level[rows], code)
        symbols = search(u_DN, code.levels(device), code.bits)
        for rows in chunks:
            dot = _dot_rows(u_DN[:, rows], symbols[:, rows], code)
            found = reached(size[rows], scale_thresholds(device), its_level[rows] * dot)
            scale[start : start + step][rows] = found.to(torch.uint8)
        codes[start : start + step] = pack_bits(symbols, code.bits)
    return codes, scale


def _scale_rows(x_ND: Tensor, level: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """x [N, D] without its mean -> u [D, N] = v y and v <y, y> [N], float32, v about 1 / rms(y).

    u is 0 where x is not finite or too large, and v <y, y> NaN.
    """
    y_DN = rotate(x_ND, randomized=True)
    square = add_rows(y_DN * y_DN)
    guess = reached(square, square_thresholds(code.gain, len(y_DN), x_ND.device), level * level)
    v = inverse_scales(code.gain, x_ND.device)[guess] / level
    return y_DN.mul_(v).masked_fill_(guess == NOT_A_NUMBER, 0.0), square * v


def _dot_rows(u_DN: Tensor, symbols_DN: Tensor, code: Code) -> Tensor:
    """<u, c> [N], at least D / 4: a code that lies far from its vector, as happens with few bits in
    all, gets a scale of no more than about 4 times the rms."""
    return add_rows(_trellis_values(symbols_DN, code).mul_(u_DN)).clamp_(min=len(u_DN) / 4)


def _trellis_values(symbols_DN: Tensor, code: Code) -> Tensor:
    """Level of every element, float32 [D, N]."""
    levels = code.levels(symbols_DN.device)
    states = states_of(symbols_DN, len(levels), code.bits)
    return levels.index_select(0, states.reshape(-1)).view(states.shape)


def _decode_rows(codes: Tensor, factor: Tensor, code: Code) -> Tensor:
    """Codes, and scales times levels -> [N, D] float32 before the mean, a view of its transpose."""
    c_DN = _trellis_values(unpack_bits(codes, code.bits), code)
    return rotate_back(c_DN.mul_(factor), randomized=True)


def _encode_by_kernels(
    kernels: Kernels, x: Tensor, code: Code, mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As _encode_by_torch. Pieces are whole rows of the mean."""
    tokens, dim = x.shape[2:]
    flat = x.reshape(-1, dim).contiguous()
    means = None if mean is None else _mean_rows(mean, dim)
    tables = (
        rotation_weights(dim, True, x.device).view(-1),
        square_thresholds(code.gain, dim, x.device),
        inverse_scales(code.gain, x.device),
    )
    levels, limits = code.levels(x.device), scale_thresholds(x.device)
    parts = []
    for group in row_chunks(max(1, len(flat) // max(1, tokens)), tokens * dim, x.device):
        rows = slice(group.start * tokens, group.stop * tokens)
        own = None if means is None else means[group]
        u_ND, size = kernels.trellis_scale(flat[rows], own, *tables)
        codes = kernels.trellis_encode(u_ND, code.bits, levels)
        scale = kernels.trellis_gain(u_ND, codes, size, own, code.bits, levels, limits)
        parts.append((codes, scale))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])


@cache
def _tables() -> dict[str, Tensor]:
    return load_file(TABLES)


@cache
def _on_device(name: str, device: torch.device) -> Tensor:
    return _tables()[name].to(device)


@cache
def _kernels(
    device: torch.device, dtype: torch.dtype, code: Code, dim: int | None = None
) -> Kernels | None:
    """CUDA kernels, ready for head size `dim`; None: there are none. They decode bit for bit as
    torch does; their search takes half numbers, with the same error on average.

    The engine says elsewhere that they are missing. A refusal is remembered, too.
    """
    if device.type != "cuda":
        return None
    from layersweep.kernels import KernelError, load_kernels
    from layersweep.kernels.codecs import TRELLIS_CODES

    if (code.window, code.bits) not in TRELLIS_CODES:
        return None
    try:
        kernels = load_kernels(device, dtype)
        if dim is not None:
            kernels.compile_vectors("trellis", dim)
    except KernelError:
        return None
    return kernels
