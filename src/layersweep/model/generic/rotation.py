"""How a layer turns its keys by position, found from what it does to them.

Codecs want keys before RoPE; transformers hands them over after it. Which pairs of coordinates turn
together, and how fast, is read off a key that is the same at every position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Positions that a rehearsal looks at: the speed of a pair is found by doubling, from one turn to
# the next, so that no multiple of 2 pi is missed.
DOUBLINGS = 17
_TOLERANCE = 1e-4


def probed_positions(limit: int) -> list[int]:
    """0, then powers of two below `limit`."""
    return [0, *(2**power for power in range(DOUBLINGS) if 2**power < limit)]


@dataclass(frozen=True)
class Rotation:
    """Coordinates `first[i]` and `second[i]` of a head turn together by `speed[i]` radians per
    position; the others stay."""

    first: Tensor
    second: Tensor
    speed: Tensor  # float64

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [len(positions), pairs], float32."""
        angle = positions.double()[:, None] * self.speed.to(positions.device)
        return angle.cos().float(), angle.sin().float()

    def turned(self, x_BHTD: Tensor, table: tuple[Tensor, Tensor], *, back: bool) -> Tensor:
        """x at the positions of `table` [T]; `back`: as it was before its model turned it."""
        cos, sin = table
        sin = -sin if back else sin
        a, b = x_BHTD[..., self.first].float(), x_BHTD[..., self.second].float()
        found = x_BHTD.clone()
        found[..., self.first] = (a * cos - b * sin).to(x_BHTD.dtype)
        found[..., self.second] = (b * cos + a * sin).to(x_BHTD.dtype)
        return found


def find_rotation(keys_PD: Tensor, positions: list[int]) -> Rotation | None:
    """How one key at `positions` (see `probed_positions`) turns. No pairs where it does not move;
    None where it moves in another way. float64."""
    keys_PD = keys_PD.double()
    moves = (keys_PD - keys_PD[0]).abs().amax(0) > 1e-7 * keys_PD[0].abs().mean()
    turning = moves.nonzero()[:, 0]
    if not len(turning):
        return Rotation(turning, turning, torch.empty(0, dtype=torch.float64))
    if len(turning) % 2:
        return None
    half = len(turning) // 2
    for first, second in (
        (turning[:half], turning[half:]),  # halves
        (turning[::2], turning[1::2]),  # neighbours
    ):
        found = _fitted(keys_PD, positions, first, second)
        if found is not None:
            return found
    return None


def _fitted(
    keys_PD: Tensor, positions: list[int], first: Tensor, second: Tensor
) -> Rotation | None:
    at = torch.complex(keys_PD[:, first], keys_PD[:, second])
    angle = (at / at[0]).angle()  # [P, pairs], modulo 2 pi
    speed = angle[1].clone()
    for row, position in enumerate(positions[1:], 1):
        expected = speed * position
        missing = angle[row] - expected
        missing = missing - (missing / (2 * torch.pi)).round() * 2 * torch.pi
        speed = (expected + missing) / position
    found = Rotation(first, second, speed)
    table = found.table(torch.tensor(positions))
    back = found.turned(keys_PD[None, None], table, back=True)[0, 0]
    error = (back - keys_PD[0]).norm(dim=1).amax() / keys_PD[0].norm()
    return found if error < _TOLERANCE * max(1, positions[-1] / 4096) else None
