"""Keys back to where they were before their positions turned them, and forth again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.families.generic.parts import Turning

Places = slice | Tensor  # coordinates of a head


@dataclass(frozen=True)
class Turner:
    """See kv.stream.Rotation. Both ways are exact inverses up to rounding, so that speeds which are
    known to seven digits are good enough.

    `first[i]` and `second[i]` are a pair, whose angle has its cosine and sine in column i of `cos`
    and `sin`, float32 [positions, pairs].
    """

    first: Places
    second: Places
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, turning: Turning, longest: int, device: torch.device) -> Turner:
        """For positions below `longest`."""
        speed = torch.tensor(turning.speed, dtype=torch.float64, device=device)
        angle = torch.arange(longest, device=device).double()[:, None] * speed
        first, second = (_places(of, device) for of in (turning.first, turning.second))
        return cls(first, second, angle.cos().float(), angle.sin().float())

    def undo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor:
        return self._turned(x_BHTD, positions, -1)

    def redo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor:
        return self._turned(x_BHTD, positions, 1)

    def _turned(self, x_BHTD: Tensor, positions: Tensor, way: int) -> Tensor:
        cos, sin = self.cos[positions[0]], self.sin[positions[0]]
        a, b = x_BHTD[..., self.first], x_BHTD[..., self.second]
        turns_all = 2 * cos.shape[1] == x_BHTD.shape[3]
        found = torch.empty_like(x_BHTD) if turns_all else x_BHTD.clone()
        found[..., self.first] = (a * cos).sub_(b * sin, alpha=way)
        found[..., self.second] = (b * cos).add_(a * sin, alpha=way)
        return found


class Turners:
    """Of the layer that a sweep is at: made once for all of its tiles, since what goes to the
    device makes the host wait. Tables of all layers, whose speeds differ in the last digit, would
    be gigabytes at 128k tokens."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._newest: tuple[Turning, Turner] | None = None

    def of(self, turning: Turning | None, longest: int) -> Turner | None:
        """For positions below `longest`; None for keys that do not turn, or in an unknown way."""
        if turning is None or not turning.first:
            return None
        if self._newest is not None and self._newest[0] == turning:
            known = self._newest[1]
            if len(known.cos) >= longest:
                return known
        self._newest = turning, Turner.of(turning, longest, self._device)
        return self._newest[1]


def _places(at: Sequence[int], device: torch.device) -> Places:
    """A slice, which views have, where the coordinates follow one another at equal distances."""
    step = at[1] - at[0] if len(at) > 1 else 1
    if step > 0 and tuple(at) == tuple(range(at[0], at[-1] + 1, step)):
        return slice(at[0], at[-1] + 1, step)
    return torch.tensor(at, device=device)
