"""Kernels of the KV codecs. They are compiled for a head size D, a multiple of 8 up to 256."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from layersweep.kernels.nvrtc import KernelError
from layersweep.kernels.runtime import Argument

# Trellis codes that have kernels: bits of a state, bits of a symbol.
TRELLIS_CODES = tuple((window, bits) for window in (8, 10) for bits in (1, 2, 3, 4))
CODEC_LAYOUTS: dict[str, dict[str, str]] = {
    "sums": {
        **dict.fromkeys(("column_sums", "column_sums_f32"), "2P3q2i"),
        "mean_and_level": "2P2i",
    },
    "sinks": {
        **dict.fromkeys(("find_sinks", "find_sinks_f32"), "4P3q4i"),
        "shift_sinks": "4P4q4if",
    },
    "lloyd": {
        **dict.fromkeys(("lloyd_encode", "lloyd_encode_f32"), "6Pqi"),
        **dict.fromkeys(("lloyd_decode", "lloyd_decode_f32"), "5Pqi"),
    },
    "trellis": {
        **dict.fromkeys(("trellis_scale", "trellis_scale_f32"), "7P2q"),
        **{f"trellis_encode_{window}_{bits}": "3Pq" for window, bits in TRELLIS_CODES},
        **{f"trellis_gain_{window}_{bits}": "7P2q" for window, bits in TRELLIS_CODES},
        **{f"trellis_decode_{window}_{bits}": "7P2q" for window, bits in TRELLIS_CODES},
    },
}
MAX_VECTOR = 256
MAX_TOKEN = 8192  # numbers of all heads, see sinks.cu
_VECTORS = 32  # of a block of 256 threads, see rotation.cuh
_TABLE_BLOCKS = 4096  # at most, of kernels whose blocks build a table each


class Launcher(Protocol):
    """Runs a kernel of one source; a Module on a GPU, an emulator in the tests."""

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: int,
        args: Sequence[Argument],
        shared: int = 0,
    ) -> None: ...


class Modules(Protocol):
    """Compiles source `name` when it is first used. `dim`: head size, of lloyd and trellis."""

    def __call__(self, name: str, dim: int = 0) -> Launcher: ...


class CodecKernels:
    """The part of `Kernels` that serves kv/: N vectors of D numbers, N = batch x heads x tokens.

    weights float32 [D] are rotate.rotation_weights everywhere. T: the module's compute dtype.
    """

    def __init__(self, dtype: torch.dtype, module: Modules) -> None:
        self.dtype = dtype
        self._module = module

    def compile_vectors(self, name: str, dim: int) -> None:
        """Compile "lloyd" or "trellis" for head size `dim` now. Raises KernelError."""
        if dim % 8 or not 8 <= dim <= MAX_VECTOR:
            raise KernelError(f"vectors of {dim}: kernels take multiples of 8 up to {MAX_VECTOR}")
        self._module(name, dim)

    def lloyd_encode(
        self, x: Tensor, bits: int, weights: Tensor, middles: Tensor, nearest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [N, D] (T or float32) -> codes uint8 [N, D bits / 8], scale float16 [N].

        As Lloyd.encode_rows in torch on this device. middles [2^(bits-1) - 1] and nearest
        [2^(bits-1)], float32, are lloyd.boundaries and lloyd.nearest_values.
        """
        count, dim = x.shape
        assert x.is_contiguous() and 1 <= bits <= 8
        for table, size in ((weights, dim), (middles, 2 ** (bits - 1) - 1)):
            same(table, torch.float32)
            assert table.numel() == size
        same(nearest, torch.float32)
        assert nearest.numel() == 2 ** (bits - 1)
        codes = torch.empty(count, dim * bits // 8, dtype=torch.uint8, device=x.device)
        scale = torch.empty(count, dtype=torch.float16, device=x.device)
        args = (x, weights, middles, nearest, codes, scale, count, bits)
        self._vectors("lloyd", "lloyd_encode" + self._suffix(x), x, args)
        return codes, scale

    def lloyd_decode(
        self, codes: Tensor, scale: Tensor, bits: int, weights: Tensor, levels: Tensor, out: Tensor
    ) -> None:
        """Fill out [N, D] (T or float32) from what lloyd_encode returned, as Lloyd.decode_rows.

        levels float32 [2^bits] are lloyd.signed_levels.
        """
        count, dim = out.shape
        same(codes, torch.uint8)
        same(scale, torch.float16)
        same(weights, torch.float32)
        same(levels, torch.float32)
        assert out.is_contiguous()
        assert codes.shape == (count, dim * bits // 8) and scale.numel() == count
        assert weights.numel() == dim and levels.numel() == 2**bits
        args = (codes, scale, weights, levels, out, count, bits)
        self._vectors("lloyd", "lloyd_decode" + self._suffix(out), out, args)

    def trellis_scale(
        self,
        x: Tensor,
        mean: Tensor | None,
        weights: Tensor,
        thresholds: Tensor,
        inverse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x [N, D] (T or float32) -> u [N, D] and size [N], float32, as kv.trellis._scale_rows.

        mean float16 [M, D + 1], the last column a level, N a multiple of M: each for N / M vectors;
        or None. thresholds float32 [255] and inverse float32 [256]: trellis_scale.square_thresholds
        and trellis_scale.inverse_scales.
        """
        count, dim = x.shape
        assert x.is_contiguous() and weights.numel() == dim
        assert thresholds.numel() == 255 and inverse.numel() == 256
        for table in (weights, thresholds, inverse):
            same(table, torch.float32)
        u = torch.empty(count, dim, dtype=torch.float32, device=x.device)
        size = torch.empty(count, dtype=torch.float32, device=x.device)
        args = (x, mean, weights, thresholds, inverse, u, size, count, _tokens(mean, count, dim))
        self._vectors("trellis", "trellis_scale" + self._suffix(x), x, args)
        return u, size

    def trellis_encode(self, u: Tensor, bits: int, levels: Tensor) -> Tensor:
        """u float32 [N, D] -> codes uint8 [N, D bits / 8], as kv.trellis_search finds them.

        levels float32 [2^L] with (L, bits) of TRELLIS_CODES, D bits >= L. u starts at a multiple
        of 16 bytes.
        """
        count, dim = u.shape
        window = _window(levels, bits, dim)
        same(u, torch.float32)
        assert u.data_ptr() % 16 == 0
        codes = torch.empty(count, dim * bits // 8, dtype=torch.uint8, device=u.device)
        if count:
            vectors = 8 if window == 8 else 2  # of a block, see trellis.cu
            name, grid = f"trellis_encode_{window}_{bits}", (-(-count // vectors), 1, 1)
            self._module("trellis", dim).launch(name, grid, 64, (u, levels, codes, count))
        return codes

    def trellis_gain(
        self,
        u: Tensor,
        codes: Tensor,
        size: Tensor,
        mean: Tensor | None,
        bits: int,
        levels: Tensor,
        thresholds: Tensor,
    ) -> Tensor:
        """Scales uint8 [N] of what trellis_scale and trellis_encode returned.

        As kv.trellis._encode_by_torch. thresholds float32 [255] are trellis_scale.scale_thresholds.
        """
        count, dim = u.shape
        width, window = dim * bits // 8, _window(levels, bits, dim)
        same(codes, torch.uint8)
        for given in (u, size, thresholds):
            same(given, torch.float32)
        assert codes.shape == (count, width) and size.numel() == count and thresholds.numel() == 255
        assert codes.data_ptr() % min(16, width & -width) == 0  # that of any row of a new tensor
        scale = torch.empty(count, dtype=torch.uint8, device=u.device)
        tokens = _tokens(mean, count, dim)
        args = (u, codes, size, mean, levels, thresholds, scale, count, tokens)
        self._vectors("trellis", f"trellis_gain_{window}_{bits}", u, args, _TABLE_BLOCKS)
        return scale

    def trellis_decode(
        self,
        codes: Tensor,
        scale: Tensor,
        mean: Tensor | None,
        bits: int,
        levels: Tensor,
        scales: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Fill out float32 [N, D] from what trellis_encode and trellis_gain returned.

        As kv.trellis._decode_rows. levels as in trellis_encode; scales float32 [256] are
        trellis_scale.scale_values; mean as in trellis_scale.
        """
        count, dim = out.shape
        width, window = dim * bits // 8, _window(levels, bits, dim)
        same(codes, torch.uint8)
        same(scale, torch.uint8)
        same(scales, torch.float32)
        same(weights, torch.float32)
        same(out, torch.float32)
        assert codes.shape == (count, width) and scale.numel() == count
        assert weights.numel() == dim and scales.numel() == 256
        assert codes.data_ptr() % min(16, width & -width) == 0  # that of any row of a new tensor
        tokens = _tokens(mean, count, dim)
        args = (codes, scale, mean, levels, scales, weights, out, count, tokens)
        name = f"trellis_decode_{window}_{bits}"
        self._vectors("trellis", name, out, args, _TABLE_BLOCKS)

    def compile_sums(self) -> None:
        """Compile what `column_sums` needs now. Raises KernelError."""
        self._module("sums")

    def column_sums(self, x: Tensor) -> Tensor:
        """float32 [2, B, H, D]: rotate.add_rows along T of x [B, H, T, D] as float32, and of its
        squares.

        x (T or float32) of any strides with the last dimension contiguous; 1 <= T < 2^22.
        """
        batch, heads, tokens, dim = x.shape
        assert 1 <= tokens < 2**22 and x.stride(3) == 1 and batch < 65536 and heads < 65536
        out = torch.empty(2, batch, heads, dim, dtype=torch.float32, device=x.device)
        if out.numel():
            args: list[Argument] = [x, out, *x.stride()[:3], tokens, dim]
            grid = (-(-dim // 32), heads, batch)
            self._module("sums").launch(f"column_sums{self._suffix(x)}", grid, 256, args)
        return out

    def mean_and_level(self, sums: Tensor, tokens: int) -> Tensor:
        """float16 [B, H, D + 1] as kv.means.mean_for makes it of sums float32 [2, B, H, D] over
        `tokens` tokens; D up to 256."""
        _, batch, heads, dim = sums.shape
        same(sums, torch.float32)
        assert dim <= MAX_VECTOR and tokens >= 1
        out = torch.empty(batch, heads, dim + 1, dtype=torch.float16, device=sums.device)
        if batch * heads:
            args = (sums, out, tokens, dim)
            self._module("sums").launch("mean_and_level", (batch * heads, 1, 1), 256, args)
        return out

    def compile_sinks(self) -> None:
        """Compile what `find_sinks` and `shift_sinks` need now. Raises KernelError."""
        self._module("sinks")

    def find_sinks(self, x: Tensor, center: Tensor, mean: Tensor) -> Tensor:
        """Flags uint8 [B, T / 8 rounded up] as kv.sinks.flags_by_torch finds them.

        x [B, H, T, D] (T or float32) of any strides with the last dimension contiguous, H D up to
        MAX_TOKEN; center [B, H, 1, D] and mean [B, H, D or more], float16.
        """
        batch, heads, tokens, dim = x.shape
        columns = _around(x, center, mean)
        flags = torch.empty(batch, -(-tokens // 8), dtype=torch.uint8, device=x.device)
        if flags.numel():
            args: list[Argument] = [x, center, mean, flags, *x.stride()[:3]]
            args += [tokens, heads, dim, columns]
            name, grid = f"find_sinks{self._suffix(x)}", (flags.shape[1], batch, 1)
            self._module("sinks").launch(name, grid, 288, args)
        return flags

    def shift_sinks_(
        self, x: Tensor, center: Tensor, mean: Tensor, flags: Tensor, sign: int
    ) -> None:
        """x += sign (mean - center) for the tokens that `flags` [B, T / 8 or more] name, rows of
        any stride; x float32, the rest as in `find_sinks`."""
        batch, heads, tokens, dim = x.shape
        columns, count = _around(x, center, mean), -(-tokens // 8)
        assert x.dtype == torch.float32 and flags.dtype == torch.uint8
        assert flags.stride(1) == 1 and flags.shape[0] == batch and flags.shape[1] >= count
        if batch * count:
            args: list[Argument] = [x, center, mean, flags, *x.stride()[:3], flags.stride(0)]
            args += [tokens, heads, dim, columns, float(sign)]
            self._module("sinks").launch("shift_sinks", (count, batch, 1), 256, args)

    def _suffix(self, vectors: Tensor) -> str:
        assert vectors.dtype in (self.dtype, torch.float32)
        return "" if vectors.dtype == self.dtype else "_f32"

    def _vectors(
        self,
        module: str,
        name: str,
        vectors: Tensor,
        args: Sequence[Argument],
        most_blocks: int = 2**31 - 1,
    ) -> None:
        count, dim = vectors.shape
        assert dim % 8 == 0 and 8 <= dim <= MAX_VECTOR
        if count:
            grid = (min(-(-count // _VECTORS), most_blocks), 1, 1)
            self._module(module, dim).launch(name, grid, 256, args)


def same(tensor: Tensor, dtype: torch.dtype) -> None:
    """Assert the type, and that the tensor is contiguous."""
    assert tensor.dtype == dtype and tensor.is_contiguous(), (tensor.dtype, tensor.stride(), dtype)


def _around(x: Tensor, center: Tensor, mean: Tensor) -> int:
    """Columns of the mean of what `find_sinks` and `shift_sinks_` take."""
    batch, heads, _, dim = x.shape
    same(center, torch.float16)
    same(mean, torch.float16)
    assert x.stride(3) == 1 and heads * dim <= MAX_TOKEN and dim % 8 == 0 and batch < 65536
    assert center.shape == (batch, heads, 1, dim)
    assert mean.shape[:2] == (batch, heads) and mean.shape[2] >= dim
    return mean.shape[2]


def _tokens(mean: Tensor | None, count: int, dim: int) -> int:
    """Vectors for each row of the mean."""
    if mean is None:
        return 1
    same(mean, torch.float16)
    assert mean.dim() == 2 and mean.shape[1] == dim + 1 and count % len(mean) == 0
    return max(1, count // len(mean))


def _window(levels: Tensor, bits: int, dim: int) -> int:
    """Bits of a state of the trellis with these levels."""
    same(levels, torch.float32)
    window = levels.numel().bit_length() - 1
    assert levels.numel() == 2**window and (window, bits) in TRELLIS_CODES, (levels.shape, bits)
    assert dim % 8 == 0 and dim <= MAX_VECTOR and dim * bits >= window, (dim, bits)
    return window
