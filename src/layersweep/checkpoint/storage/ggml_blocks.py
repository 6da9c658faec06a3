"""GGML's blocks in plain torch: each type's bytes to float32, in the order of ggml's own sums.

Most types keep numbers of `bits` bits in runs of bytes: the lowest bits of a run's bytes are its
first numbers, in order, the next bits the numbers after them. `_fields` reads those. Sums and
products are those of ggml's reference in their order, so results equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layersweep.checkpoint.storage.floats import copy_turned
from layersweep.checkpoint.storage.ggml import GgmlType

if TYPE_CHECKING:
    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike

_PIECE = 1 << 20  # elements that are decoded at once on the CPU, where they stay in its cache

# Levels of the types that look numbers up; MXFP4's are doubled, and its scales halved.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Blocks:
    """`data`: uint8, whole blocks. `turned`: see Ggml."""

    data: Tensor
    type: GgmlType
    turned: int = 0

    def decode(self, out: Tensor) -> None:
        blocks, size = self.data.view(-1, self.type.nbytes), self.type.elements
        assert out.is_contiguous() and out.numel() == len(blocks) * size
        target = torch.empty_like(out) if self.turned else out
        values = target.view(-1, size)
        step = len(blocks) if self.data.is_cuda else max(1, _PIECE // size)
        for start in range(0, len(blocks), max(1, step)):
            part = blocks[start : start + step]
            values[start : start + step] = DECODERS[self.type.name](part)
        if self.turned:
            copy_turned(target, out, self.turned)

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        kernels.ggml_dequantize(self.data, self.type.name.lower(), out, self.turned)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        if any(shift % 16 for shift in alike.shifts) or alike.step % 8:
            return False
        kernels.ggml_dequantize(self.data, self.type.name.lower(), out, self.turned, alike)
        return True


def _fields(packed: Tensor, run: int, bits: int) -> Tensor:
    """uint8 [n, B] -> uint8 [n, B * 8 / bits], numbers of `bits` bits out of runs of bytes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    runs = packed.reshape(len(packed), -1, 1, run)
    return ((runs >> shifts[:, None]) & ((1 << bits) - 1)).view(len(packed), -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at`, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _times(scales: Tensor, numbers: Tensor) -> Tensor:
    """Each scale [n, S] times its share of the numbers [n, N], in float32."""
    shares = numbers.float().view(len(numbers), scales.shape[1], -1)
    return (shares * scales[:, :, None]).view(len(numbers), -1)


def _plus(offsets: Tensor, values: Tensor) -> Tensor:
    """Each offset [n, S] plus its share of the values [n, N]."""
    shares = values.view(len(values), offsets.shape[1], -1)
    return (shares + offsets[:, :, None]).view(len(values), -1)


def _signed(numbers: Tensor, zero: int) -> Tensor:
    return numbers.to(torch.int16) - zero


def _looked_up(numbers: Tensor, levels: tuple[int, ...]) -> Tensor:
    table = torch.tensor(levels, dtype=torch.float32, device=numbers.device)
    return table[numbers.int()]


def _q4_0(blocks: Tensor) -> Tensor:
    return _times(_half(blocks, 0), _signed(_fields(blocks[:, 2:], 16, 4), 8))


def _q4_1(blocks: Tensor) -> Tensor:
    return _plus(_half(blocks, 2), _times(_half(blocks, 0), _fields(blocks[:, 4:], 16, 4)))


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """The fifth bits are a word of 32, lowest first."""
    return _fields(low, 16, 4) | _fields(high, 1, 1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    return _times(_half(blocks, 0), _signed(_five_bits(blocks[:, 6:], blocks[:, 2:6]), 16))


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _five_bits(blocks[:, 8:], blocks[:, 4:8])
    return _plus(_half(blocks, 2), _times(_half(blocks, 0), numbers))


def _q8_0(blocks: Tensor) -> Tensor:
    return _times(_half(blocks, 0), blocks[:, 2:].contiguous().view(torch.int8))


def _q2_k(blocks: Tensor) -> Tensor:
    scales, numbers = blocks[:, :16], _fields(blocks[:, 16:80], 32, 2)
    lowest = _half(blocks, 82) * (scales >> 4)
    return _plus(-lowest, _times(_half(blocks, 80) * (scales & 15), numbers))


def _q3_k(blocks: Tensor) -> Tensor:
    high, low, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    six_bits = _fields(packed[:, :8], 8, 4) | _fields(packed[:, 8:], 4, 2) << 4
    numbers = _fields(low, 32, 2) | _fields(high, 32, 1) << 2
    return _times(_half(blocks, 108) * _signed(six_bits, 32), _signed(numbers, 4))


def _scales_and_lowest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: eight pairs of 6 bits in 12 bytes, the last four's high bits on top of the
    first four."""
    first, second, third = blocks[:, 4:16].view(len(blocks), 3, 4).unbind(1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    lowest = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * lowest


def _q4_k(blocks: Tensor) -> Tensor:
    scales, lowest = _scales_and_lowest(blocks)
    return _plus(-lowest, _times(scales, _fields(blocks[:, 16:], 32, 4)))


def _q5_k(blocks: Tensor) -> Tensor:
    scales, lowest = _scales_and_lowest(blocks)
    numbers = _fields(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 32, 1) << 4
    return _plus(-lowest, _times(scales, numbers))


def _q6_k(blocks: Tensor) -> Tensor:
    numbers = _fields(blocks[:, :128], 64, 4) | _fields(blocks[:, 128:192], 32, 2) << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    return _times(scales, _signed(numbers, 32))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _times(_half(blocks, 0), _looked_up(_fields(blocks[:, 2:], 16, 4), IQ4_LEVELS))


def _iq4_xs(blocks: Tensor) -> Tensor:
    six_bits = _fields(blocks[:, 4:8], 1, 4) | _fields(blocks[:, 2:4], 1, 2) << 4
    numbers = _looked_up(_fields(blocks[:, 8:], 16, 4), IQ4_LEVELS)
    return _times(_half(blocks, 0) * _signed(six_bits, 32), numbers)


def _mxfp4(blocks: Tensor) -> Tensor:
    power = blocks[:, :1].int()  # half of 2^(power - 127), in float32's own bits
    bits = torch.where(power < 2, 0x00200000 << power, (power - 1) << 23)
    return _times(bits.view(torch.float32), _looked_up(_fields(blocks[:, 1:], 16, 4), MXFP4_LEVELS))


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
