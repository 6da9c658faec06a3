"""NF4 in plain torch: 16 levels of 4 bits, one float32 scale (absmax) per block of elements.

A weight is flattened row by row. Byte i holds element 2i in its high nibble and 2i + 1 in its
low one; an odd count pads the last low nibble. Block b covers elements
[b * blocksize, (b + 1) * blocksize), across rows where it must.

    value = CODE[nibble] * absmax[block]                          float32, then one cast
    absmax = nested_map[u8] * nested_absmax[b // 256] + offset    two float32 roundings

Every result here equals that of bitsandbytes on the CPU, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from layersweep.checkpoint.tables import CODES, FP4_CODE, NF4_CODE
from layersweep.errors import CheckpointError

if TYPE_CHECKING:
    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike, Nested

__all__ = [
    "CODES",
    "FP4_CODE",
    "NF4_CODE",
    "NestedScales",
    "QuantizedTensor",
    "check_products",
    "check_scales",
    "dequantize",
    "dynamic_map",
    "expand_absmax",
    "level_bounds",
    "quantize",
    "to_tensors",
    "with_scales",
]

NESTED_BLOCKSIZE = 256
# The table lookup stays in the processor's cache: 3.3 G elements/s on two cores in pieces of
# this many elements, 0.9 over a whole 8 M element weight, and 0.1 by masking nibbles.
_PIECE = 1 << 20
_GRID = 65535.0
SMALLEST_SCALE = 1e-38  # blocks of zeros are divided by this


@dataclass(frozen=True)
class NestedScales:
    """Scales of scales. absmax f32 [ceil(blocks / 256)], quant_map f32 [256], offset."""

    absmax: Tensor
    quant_map: Tensor
    blocksize: int
    offset: float


@dataclass(frozen=True)
class QuantizedTensor:
    """packed u8 [ceil(n / 2)]; absmax u8 [blocks] if nested, else f32 [blocks]."""

    packed: Tensor
    absmax: Tensor
    blocksize: int
    nested: NestedScales | None
    kind: Literal["nf4", "fp4"] = "nf4"

    def scales(self) -> Tensor:
        """absmax as f32 [blocks], expanded where it is nested."""
        if self.nested is None:
            return self.absmax
        parts = self.nested
        return expand_absmax(
            self.absmax, parts.absmax, parts.quant_map, parts.blocksize, parts.offset
        )

    def decode(self, out: Tensor) -> None:
        """Fill `out` (dense shape and dtype)."""
        dequantize(
            self.packed, self.scales(), self.blocksize, out.shape, out.dtype, out=out,
            code=CODES[self.kind],
        )  # fmt: skip

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        """The same by a CUDA kernel, bit for bit."""
        kernels.nf4_dequantize(*self._pointers(), out)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        """The same for weights that lie alike; False where the fast kernel cannot."""
        return kernels.nf4_dequantize_alike(*self._pointers(), out, alike)

    def _pointers(self) -> tuple[Tensor, Tensor, Nested | None, int, Tensor]:
        """As the kernels take them."""
        scales, nested = None, self.nested
        if nested is not None:
            scales = (nested.absmax, nested.quant_map, nested.blocksize, nested.offset)
        code = _code_on(self.kind, self.packed.device)
        return self.packed, self.absmax, scales, self.blocksize, code


def expand_absmax(
    absmax_u8: Tensor,
    nested_absmax: Tensor,
    nested_quant_map: Tensor,
    nested_blocksize: int,
    offset: float,
    skip: int = 0,
) -> Tensor:
    """Scales f32 [blocks] of a nested (double) quantization: product, rounded, then sum, rounded.

    The first of them is number `skip` of its nested block. A fused multiply-add would change 7.7 %
    of them. Negative scales are legitimate here: the
    decoded difference from the mean can exceed the mean.
    """
    blocks = absmax_u8.numel()
    levels = nested_quant_map.index_select(0, absmax_u8.reshape(-1).int())
    outer = nested_absmax.repeat_interleave(nested_blocksize)[skip : skip + blocks]
    return levels.mul_(outer).add_(offset)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
    code: Sequence[float] = NF4_CODE,
) -> Tensor:
    """The dense weight [*shape] of `packed` u8 (flat) and `absmax` f32 [blocks].

    Computed in float32, cast once to `dtype`. `out`, contiguous, of that shape and dtype, is
    filled and returned if given. Works on any device, in pieces of 1 M elements on the CPU.
    Raises ValueError where sizes do not fit each other: a caller's mistake, files were checked.
    """
    count = math.prod(shape)
    if packed.numel() != (count + 1) // 2 or absmax.numel() != -(-count // blocksize):
        raise ValueError(
            f"{packed.numel()} bytes and {absmax.numel()} scales, needed {(count + 1) // 2} and "
            f"{-(-count // blocksize)} for shape {tuple(shape)} in blocks of {blocksize}"
        )
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    if out.dtype != dtype or tuple(out.shape) != tuple(shape) or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, needed {dtype} {tuple(shape)}")
    flat, pairs = out.view(-1), _pair_table(tuple(code), packed.device)
    step = count + 1 if packed.is_cuda else _PIECE - _PIECE % (2 * blocksize) or 2 * blocksize
    scratch = torch.empty(min(step, count + 1), dtype=torch.float32, device=packed.device)
    packed = packed.reshape(-1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        bytes_here = packed[start // 2 : (stop + 1) // 2]
        # Two floats are gathered as one 64-bit word.
        target = flat[start:stop] if dtype == torch.float32 and stop % 2 == 0 else scratch
        words = target[: 2 * bytes_here.numel()].view(torch.int64)
        torch.index_select(pairs, 0, bytes_here.int(), out=words)
        scales = absmax[start // blocksize : -(-stop // blocksize)]
        _scale_blocks(target[: stop - start], scales, blocksize, flat[start:stop])
    return out


def quantize(weight: Tensor, blocksize: int = 64, nested: bool = True) -> QuantizedTensor:
    """`weight` (any shape, f32, f16 or bf16, finite) as NF4 with plain or nested scales.

    Levels are found by the midpoints between neighbours, on the value times the reciprocal of
    its block's largest magnitude, as bitsandbytes does; scales are averaged, and the differences
    from that mean go through an 8-bit table in blocks of 256.
    """
    flat = weight.detach().reshape(-1).float()
    count = flat.numel()
    full = count - count % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_SCALE))[:, None]
    scaled = scaled.clamp_(-1.0, 1.0).reshape(-1)
    if full < count:  # a last partial block is divided, not multiplied by a reciprocal
        last = flat[full:].abs().max().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp_(-1.0, 1.0)])
    if count % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    bounds = level_bounds().to(weight.device)
    levels = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    packed = (levels[::2] << 4) | levels[1::2]
    return with_scales(packed, absmax, blocksize, nested)


def level_bounds() -> Tensor:
    """The midpoints between neighbouring levels, f32 [15], ascending."""
    code = torch.tensor(NF4_CODE, dtype=torch.float32)
    return (code[:-1] + code[1:]) / 2


def with_scales(packed: Tensor, absmax: Tensor, blocksize: int, nested: bool) -> QuantizedTensor:
    """Packed levels u8 and their scales f32 [blocks], which are quantized too if `nested`.

    Their mean is torch's, so its last bit depends on torch's number of threads, here as there.
    """
    if not nested:
        return QuantizedTensor(packed, absmax, blocksize, None)
    offset = absmax.mean()
    codes, outer, table = _quantize_scales(absmax - offset)
    parts = NestedScales(outer, table, NESTED_BLOCKSIZE, offset.item())
    return QuantizedTensor(packed, codes, blocksize, parts)


def to_tensors(
    name: str, quantized: QuantizedTensor, dtype: torch.dtype, shape: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors that a published checkpoint holds for weight `name` ("...q_proj.weight").

    `dtype` is the one the weight had before; the settings are JSON bytes in a tensor of their own.
    """
    settings: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": quantized.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    tensors = {
        name: quantized.packed.view(-1, 1),
        f"{name}.absmax": quantized.absmax,
        f"{name}.quant_map": torch.tensor(NF4_CODE, dtype=torch.float32),
    }
    if quantized.nested is not None:
        tensors[f"{name}.nested_absmax"] = quantized.nested.absmax
        tensors[f"{name}.nested_quant_map"] = quantized.nested.quant_map
        settings["nested_blocksize"] = quantized.nested.blocksize
        settings["nested_dtype"] = "float32"
        settings["nested_offset"] = quantized.nested.offset
    encoded = json.dumps(settings).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(encoded), dtype=torch.uint8
    )
    return tensors


def check_scales(scales: Tensor, *, file: object, tensor: str, signed: bool) -> None:
    """Raises CheckpointError when a stored scale is NaN or infinite, or negative where plain.

    `scales` is absmax (plain), nested_absmax or nested_quant_map as stored; `signed` says that
    negative values are legitimate (nested_quant_map).
    """
    if scales.numel() == 0:
        return
    lowest, highest = (bound.item() for bound in scales.aminmax())  # NaN where one is NaN
    if math.isfinite(lowest) and math.isfinite(highest) and (signed or lowest >= 0):
        return
    finite = torch.isfinite(scales)
    bad = ~finite if signed else ~finite | (scales < 0)
    index = int(bad.reshape(-1).int().argmax())
    value = float(scales.reshape(-1)[index])
    needed = "finite scales" if signed else "finite scales that are not negative"
    raise CheckpointError(
        f"{file}: {tensor}[{index}]: found {value}, needed {needed}",
        hint="the file is damaged or was quantized from damaged weights; download it again",
    )


def check_products(
    nested_absmax: Tensor, nested_quant_map: Tensor, offset: float, *, file: object, tensor: str
) -> None:
    """Raises CheckpointError when finite nested scales can make an infinite one."""
    # Python's floats hold every product of two float32
    largest = nested_absmax.max().item() * nested_quant_map.abs().max().item() + abs(offset)
    limit = torch.finfo(torch.float32).max
    if largest > limit:
        raise CheckpointError(
            f"{file}: {tensor}: found scales up to {largest:.1e}, which overflow, needed at most "
            f"{limit:.1e}",
            hint="the file is damaged or was quantized from damaged weights; download it again",
        )


def dynamic_map() -> Tensor:
    """The 8-bit table of nested scales, f32 [256], ascending (Dettmers 2015, arXiv 1511.04561).

    For every decade 10^-6 .. 10^0 the midpoints of 2^i equal parts of [0.1, 1], with both signs,
    and 0 and 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)


def _quantize_scales(differences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u8 [blocks], f32 [ceil(blocks / 256)], table f32 [256]) of the scales less their mean."""
    table = dynamic_map().to(differences.device)
    count = differences.numel()
    groups = -(-count // NESTED_BLOCKSIZE)
    padded = torch.nn.functional.pad(differences, (0, groups * NESTED_BLOCKSIZE - count))
    grid = padded.view(groups, NESTED_BLOCKSIZE)
    outer = grid.abs().amax(dim=1)
    normed = (grid * (1.0 / outer)[:, None]).view(-1)[:count]
    # bitsandbytes snaps to a grid of 2^16 points before it takes the nearest level.
    point = ((normed + 1.0) * 0.5 * _GRID + 0.5).floor()
    snapped = point * 2.0 / _GRID - 1.0
    codes = torch.bucketize(snapped, (table[:-1] + table[1:]) / 2, out_int32=True)
    codes[(outer == 0).repeat_interleave(NESTED_BLOCKSIZE)[:count]] = 0
    return codes.to(torch.uint8), outer, table


@lru_cache(maxsize=32)
def _code_on(kind: str, device: torch.device) -> Tensor:
    """The 16 levels, float32."""
    return torch.tensor(CODES[kind], dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _pair_table(code: tuple[float, ...], device: torch.device) -> Tensor:
    """int64 [256]: the two float32 values of each byte, high nibble first, as one 64-bit word."""
    levels = torch.tensor(code, dtype=torch.float32)
    byte = torch.arange(256)
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def _scale_blocks(levels: Tensor, scales: Tensor, blocksize: int, out: Tensor) -> None:
    """out[i] = levels[i] * scales[i // blocksize] in float32, cast once to the dtype of out."""
    full = levels.numel() // blocksize * blocksize
    torch.mul(
        levels[:full].view(-1, blocksize),
        scales[: full // blocksize, None],
        out=out[:full].view(-1, blocksize),
    )
    if full < levels.numel():
        torch.mul(levels[full:], scales[-1], out=out[full:])
