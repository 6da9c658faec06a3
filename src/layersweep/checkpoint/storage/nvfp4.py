"""NVFP4: e2m1 numbers in groups of 16 with an e4m3 scale each, and a float32 scale for all.

modelopt            weight U8 [rows, columns / 2] | weight_scale | weight_scale_2
compressed-tensors  weight_packed, the same       | weight_scale | weight_global_scale
                                F8_E4M3 [rows, columns / 16], F32 [1]

    value = e2m1 * (e4m3 * weight_scale_2)           each product rounded to float32, then one cast
    value = e2m1 * (e4m3 / weight_global_scale)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import scales
from layersweep.checkpoint.storage.e2m1 import decode_groups
from layersweep.checkpoint.storage.storage import Headers, Look, Storage, cut_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike

GROUP = 16
PACKED = "_packed"  # ends compressed-tensors' name of the data
SCALE, FACTOR, DIVISOR = "_scale", "_scale_2", "_global_scale"
_SMALLEST = 1e-30  # of a global scale: less would make others infinite


@dataclass(frozen=True)
class Nvfp4(Storage):
    """`divides`: the scale for all is a divisor of the others, not a factor."""

    data: StoredTensor
    scale: StoredTensor
    whole: StoredTensor
    divides: bool

    @property
    def kind(self) -> str:
        return "nvfp4"

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.data, self.scale, self.whole

    @property
    def block(self) -> int:
        return GROUP

    @property
    def words(self) -> str:
        return f"groups of {GROUP}"

    @property
    def layout(self) -> tuple[object, ...]:
        return self.kind, self.divides

    @property
    def looks(self) -> tuple[Look, ...]:
        least = _SMALLEST if self.divides else 0.0
        return scales.look_at(1, self.scale), Look(2, "f4", 1, least=least)

    def check(self, parts: Sequence[Tensor]) -> None:
        scales.check_scales(parts[1], self.scale)
        least = _SMALLEST if self.divides else 0.0
        scales.check_scales(parts[2], self.whole, least)

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> TwiceScaled:
        return TwiceScaled(parts[0], parts[1], parts[2], self)

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Nvfp4:
        data = cut_tensor(self.data, start // 2, count // 2)
        return replace(
            self, data=data, scale=cut_tensor(self.scale, start // GROUP, count // GROUP)
        )


@dataclass(frozen=True)
class TwiceScaled:
    """uint8: two numbers a byte, a scale for 8 bytes, the 4 bytes of the scale for all."""

    codes: Tensor
    scales: Tensor
    whole: Tensor
    stored: Nvfp4

    def decode(self, out: Tensor) -> None:
        import torch

        own = scales.floats(self.scales, self.stored.scale)
        whole = self.whole.view(torch.float32)
        both = own / whole if self.stored.divides else own * whole
        decode_groups(self.codes, both, GROUP, out)

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        kernels.nvfp4_dequantize(self.codes, self.scales, self.whole, self.stored.divides, out)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        divides = self.stored.divides
        kernels.nvfp4_dequantize(self.codes, self.scales, self.whole, divides, out, alike)
        return True


def base(tensor: StoredTensor) -> str | None:
    """Told by names alone: modelopt's data looks like any other packed one."""
    if tensor.name.endswith(FACTOR):
        return tensor.name.removesuffix(FACTOR)
    packed = tensor.dtype == "U8" and tensor.name.endswith(PACKED)
    return tensor.name.removesuffix(PACKED) if packed else None


def companions(base: str) -> tuple[str, ...]:
    return tuple(base + suffix for suffix in (PACKED, SCALE, FACTOR, DIVISOR))


def match(headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
    divides = base + PACKED in headers.tensors
    data = headers.tensors.get(base + PACKED if divides else base)
    scale = headers.tensors.get(base + SCALE)
    whole = headers.tensors.get(base + (DIVISOR if divides else FACTOR))
    if data is None or scale is None or whole is None:
        there = next(one for one in (data, whole) if one is not None)
        names = (PACKED, SCALE, DIVISOR) if divides else ("", SCALE, FACTOR)
        needed = ", ".join(base + name for name in names) + " in one of the shards"
        headers.problem(there, "NVFP4 with one of its tensors missing", needed)
        return None
    if len(shape) != 2 or shape[1] % GROUP or data.shape != (shape[0], shape[1] // 2):
        needed = f"U8 {[*shape[:-1], shape[-1] // 2]} for {list(shape)}, by config.json"
        headers.problem(data, data.describe(), needed)
        return None
    groups = shape[0], shape[1] // GROUP
    if (scale.dtype, scale.shape) != (scales.E4M3, groups):
        headers.problem(scale, scale.describe(), f"{scales.E4M3} {list(groups)}")
        return None
    if whole.dtype != "F32" or math.prod(whole.shape) != 1:
        headers.problem(whole, whole.describe(), "F32 [1]")
        return None
    return Nvfp4(data, scale, whole, divides)
