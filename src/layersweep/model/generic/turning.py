"""Keys back to where they were before their positions turned them, and forth again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layersweep.families.generic.parts import Turning


@dataclass(frozen=True)
class Turner:
    """See kv.stream.Rotation. Both ways are exact inverses up to rounding, so that speeds which are
    known to seven digits are good enough."""

    turning: Turning

    def undo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor:
        return self._turned(x_BHTD, positions, -1.0)

    def redo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor:
        return self._turned(x_BHTD, positions, 1.0)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        speed = torch.tensor(self.turning.speed, dtype=torch.float64)
        return torch.tensor(self.turning.first), torch.tensor(self.turning.second), speed

    def _turned(self, x_BHTD: Tensor, positions: Tensor, way: float) -> Tensor:
        first, second, speed = (of.to(x_BHTD.device) for of in self._pairs)
        angle = positions[0].double()[:, None] * speed
        cos, sin = angle.cos().float(), (way * angle.sin()).float()
        a, b = x_BHTD[..., first], x_BHTD[..., second]
        found = x_BHTD.clone()
        found[..., first] = a * cos - b * sin
        found[..., second] = b * cos + a * sin
        return found
