"""`trellis`: channel mean, random rotation, 8-bit scale, a tail-biting bitshift trellis code.

Per head vector x of size D, with the channel mean m [D] of its sequence and head:
    y = rotate(x - m)              nearly Gaussian, whatever x was
    q = 8 log2(g rms(y)), rounded  the stored scale is s = 2^(q / 8), one byte with an offset
    u = g y / s                    rms 1, up to the rounding of q
    b = the D symbols of `bits` bits whose levels c, all together, lie nearest to u
    x^ = m + rotate_back(s c)
Element t has the level TABLE[s_t], s_t the last L bits of the stream of symbols at t: every level
serves several neighbours, so D bits buy a code of D dimensions. The stream is a ring, hence exactly
`bits` per element and no state to store. Levels are trained (tools/make_trellis_tables.py), and
centroids: <u, c> is (1 - d) <u, u>, d the distortion. The gain g = 1 / (1 - d) brings <x, x^> back
to <x, x> on average; without it scores flatten and sums of values shrink.

Bits per element: bits + 8 / D + 16 / T, T the tokens that share a mean.

Sources: bitshift trellis and tail-biting by two passes, QTIP (arXiv 2406.11235); trellis coded
quantization, Marcellin and Fischer (1990). Limits of the scale: below an rms of 1.5e-5 a vector
becomes its mean; above 50,000, or not finite, it decodes to NaN, which the reader reports.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.codec import Codec, Packed, check_input, join_tokens, role_bits
from layersweep.kv.identity import Identity
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import add_rows, rotate, rotate_back, rotation_weights, row_chunks
from layersweep.kv.stream import Stream
from layersweep.kv.trellis_search import encoder_name, search, states_of

if TYPE_CHECKING:
    from layersweep.kernels import Kernels

TABLES = Path(__file__).with_name("trellis_tables.safetensors")
_STEPS = 8  # of the scale per octave
_OFFSET = 128  # code of scale 1
_ZERO, _NOT_A_NUMBER = 0, 255  # codes of the scales 0 and NaN
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
class Trellis:
    """See the module's text. `states`: of the trellis; more of them cost time and gain quality."""

    key_bits: int
    value_bits: int
    states: str = "256"

    method = "trellis"
    version = "1"
    simulated = False
    wants_mean = True
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

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        check_input(self, x, stream, None)
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
        return self._encode(x, code, mean)

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return join_tokens([packed, self._encode(x, self._code(packed.bits), packed.mean)])

    def _code(self, bits: int) -> Code:
        return Code(int(self.states).bit_length() - 1, bits)

    def _encode(self, x: Tensor, code: Code, mean: Tensor | None) -> Packed:
        # Kernels for float32 input are part of every module: one less to compile.
        dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
        if kernels := _kernels(x.device, dtype, code, x.shape[3]):
            codes, scale = _encode_by_kernels(kernels, x, code, mean)
        else:
            codes, scale = _encode_by_torch(x, code, mean)
        dim, shape = x.shape[3], x.shape[:3]
        codes = codes.view(*shape, dim * code.bits // 8)
        return Packed(code.bits, dim, codes, scale.view(shape), mean)

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        assert packed.scale is not None
        shape, dim, device = packed.codes.shape[:3], packed.dim, packed.codes.device
        code, mean = self._code(packed.bits), packed.mean
        codes, scale = packed.codes.reshape(-1, packed.codes.shape[3]), packed.scale.reshape(-1)
        out = torch.empty(len(codes), dim, dtype=torch.float32, device=device)
        if kernels := _kernels(device, torch.float16, code, dim):  # any T: the output is float32
            kernels.trellis_decode(
                codes.contiguous(),
                scale.contiguous(),
                None if mean is None else mean.reshape(-1, dim),
                code.bits,
                code.levels(device),
                scale_values(device),
                rotation_weights(dim, True, device).view(-1),
                out,
            )
            return out.view(*shape, dim)
        for rows in row_chunks(len(codes), dim, device):
            out[rows] = _decode_rows(codes[rows], scale[rows], code)
        out = out.view(*shape, dim)
        return out if mean is None else out.add_(mean.float().unsqueeze(2))

    def nbytes(self, packed: Packed) -> int:
        assert packed.scale is not None
        mean = 0 if packed.mean is None else 2 * packed.mean.numel()
        return packed.codes.numel() + packed.scale.numel() + mean

    def sharing_key(self, stream: Stream) -> Hashable:
        return (self.method, self.states, role_bits(self, stream))

    def identity(self) -> Codec:
        return Identity(of=self.method, randomized=True, wants_basis=True)


def scale_values(device: torch.device) -> Tensor:
    """Stored scale of every code, float32 [256]."""
    return _on_device("scales", device)


@cache
def inverse_scales(code: Code, device: torch.device) -> Tensor:
    """g / s of every code, float32 [256]; 0 where the scale is 0 or NaN."""
    values = [code.gain * 2 ** ((_OFFSET - q) / _STEPS) for q in range(256)]
    values[_ZERO] = values[_NOT_A_NUMBER] = 0.0
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def thresholds(code: Code, dim: int, device: torch.device) -> Tensor:
    """Sum of squares of a rotated vector from which each code 1 ... 255 is taken, float32 [255].

    Comparing squares needs no root and no logarithm, which devices round differently.
    """
    least = (2 ** ((q - 0.5 - _OFFSET) / _STEPS) / code.gain for q in range(1, 256))
    return torch.tensor([dim * rms * rms for rms in least], dtype=torch.float32, device=device)


def _encode_by_torch(x: Tensor, code: Code, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] -> codes [B H T, D bits / 8] uint8, scale [B H T] uint8."""
    dim, device = x.shape[3], x.device
    flat = (x if mean is None else x.float() - mean.float().unsqueeze(2)).reshape(-1, dim)
    codes = torch.empty(len(flat), dim * code.bits // 8, dtype=torch.uint8, device=device)
    scale = torch.empty(len(flat), dtype=torch.uint8, device=device)
    step = _SEARCH_STATES >> code.window
    for start in range(0, len(flat), step):
        piece, its_scale = flat[start : start + step], scale[start : start + step]
        u_DN = torch.empty(dim, len(piece), dtype=torch.float32, device=device)
        for rows in row_chunks(len(piece), dim, device):
            u_DN[:, rows], its_scale[rows] = _scale_rows(piece[rows], code)
        symbols = search(u_DN, code.levels(device), code.bits)
        codes[start : start + step] = pack_bits(symbols, code.bits)
    return codes, scale


def _scale_rows(x_ND: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """x [N, D] without its mean -> u [D, N] float32, code of the scale [N] uint8."""
    y_DN = rotate(x_ND, randomized=True)
    edges = thresholds(code, len(y_DN), x_ND.device)
    scale = torch.bucketize(add_rows(y_DN * y_DN), edges, right=True)  # NaN goes to the end
    y_DN.mul_(inverse_scales(code, x_ND.device)[scale])
    return y_DN.masked_fill_(scale == _NOT_A_NUMBER, 0.0), scale.to(torch.uint8)


def _decode_rows(codes: Tensor, scale: Tensor, code: Code) -> Tensor:
    """Codes and scales -> [N, D] float32 before the mean, a view of its transpose."""
    levels = code.levels(codes.device)
    states = states_of(unpack_bits(codes, code.bits), len(levels), code.bits)
    c_DN = levels.index_select(0, states.view(-1)).view(states.shape)
    c_DN.mul_(scale_values(codes.device)[scale.int()])
    return rotate_back(c_DN, randomized=True)


def _encode_by_kernels(
    kernels: Kernels, x: Tensor, code: Code, mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As _encode_by_torch. Pieces are whole rows of the mean."""
    tokens, dim = x.shape[2:]
    flat = x.reshape(-1, dim).contiguous()
    means = None if mean is None else mean.reshape(-1, dim)
    codes = torch.empty(len(flat), dim * code.bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(len(flat), dtype=torch.uint8, device=x.device)
    tables = (
        rotation_weights(dim, True, x.device).view(-1),
        thresholds(code, dim, x.device),
        inverse_scales(code, x.device),
    )
    for group in row_chunks(len(flat) // max(1, tokens), tokens * dim, x.device):
        rows = slice(group.start * tokens, group.stop * tokens)
        own = None if means is None else means[group]
        u_ND, scale[rows] = kernels.trellis_scale(flat[rows], own, *tables)
        codes[rows] = kernels.trellis_encode(u_ND, code.bits, code.levels(x.device))
    return codes, scale


@cache
def _tables() -> dict[str, Tensor]:
    tables = load_file(TABLES)
    scales = [2 ** ((q - _OFFSET) / _STEPS) for q in range(256)]
    scales[_ZERO], scales[_NOT_A_NUMBER] = 0.0, float("nan")
    return tables | {"scales": torch.tensor(scales, dtype=torch.float32)}


@cache
def _on_device(name: str, device: torch.device) -> Tensor:
    return _tables()[name].to(device)


@cache
def _kernels(
    device: torch.device, dtype: torch.dtype, code: Code, dim: int | None = None
) -> Kernels | None:
    """CUDA kernels, equal to torch bit for bit, ready for head size `dim`; None: there are none.

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
