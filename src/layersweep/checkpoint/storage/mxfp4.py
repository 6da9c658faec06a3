"""MXFP4 as gpt-oss is published: e2m1 numbers in groups of 32 that share a power of two.

blocks U8 [..., rows, columns / 32, 16] | scales U8 [..., rows, columns / 32], exponents + 127

    value = e2m1 * 2^(scale - 127)      exact in float32, then one cast

`..._blocks` and `..._scales` hold all experts of a layer. Rows are those of a linear layer: only
transformers turns them.
"""

from __future__ import annotations

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

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4(Storage):
    data: StoredTensor
    scale: StoredTensor

    @property
    def kind(self) -> str:
        return "mxfp4"

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.data, self.scale

    @property
    def block(self) -> int:
        return GROUP

    @property
    def words(self) -> str:
        return f"groups of {GROUP}"

    @property
    def looks(self) -> tuple[Look, ...]:
        return (scales.look_at(1, self.scale),)

    def check(self, parts: Sequence[Tensor]) -> None:
        scales.check_scales(parts[1], self.scale)

    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Groups:
        return Groups(parts[0], parts[1], self.scale)

    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Mxfp4:
        data = cut_tensor(self.data, start // 2, count // 2)
        return replace(
            self, data=data, scale=cut_tensor(self.scale, start // GROUP, count // GROUP)
        )


@dataclass(frozen=True)
class Groups:
    """uint8: two numbers a byte, and a scale for 16 bytes."""

    codes: Tensor
    scales: Tensor
    stored: StoredTensor

    def decode(self, out: Tensor) -> None:
        decode_groups(self.codes, scales.floats(self.scales, self.stored), GROUP, out)

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        kernels.mxfp4_dequantize(self.codes, self.scales, out)

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        kernels.mxfp4_dequantize(self.codes, self.scales, out, alike)
        return True


def base(tensor: StoredTensor) -> str | None:
    return tensor.name if tensor.dtype == "U8" and tensor.name.endswith(BLOCKS) else None


def companions(base: str) -> tuple[str, ...]:
    return (base.removesuffix(BLOCKS) + SCALES,)


def match(headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
    data, (name,) = headers.tensors[base], companions(base)
    groups = (*shape[:-1], shape[-1] // GROUP)
    if shape[-1] % GROUP or data.shape != (*groups, GROUP // 2):
        needed = f"U8 {[*groups, GROUP // 2]} for {list(shape)}, by config.json"
        headers.problem(data, data.describe(), needed)
        return None
    scale = headers.tensors.get(name)
    if scale is None:
        headers.problem(data, "MXFP4 blocks without scales", f"{name} in one of the shards")
        return None
    if (scale.dtype, scale.shape) != ("U8", groups):
        headers.problem(scale, scale.describe(), f"U8 {list(groups)}")
        return None
    return Mxfp4(data, scale)
