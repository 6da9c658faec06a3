"""How a layer turns its keys by position, found from what it does to them.

Codecs want keys before RoPE; transformers hands them over after it. Which pairs of coordinates turn
together, and how fast, is read off a key that is the same at every position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.families.generic.parts import Turning

# Positions that a rehearsal looks at: the speed of a pair is found by doubling, from one turn to
# the next, so that no multiple of 2 pi is missed.
DOUBLINGS = 17
_TOLERANCE = 1e-4


def probed_positions(limit: int) -> list[int]:
    """0, then powers of two below `limit`."""
    return [0, *(2**power for power in range(DOUBLINGS) if 2**power < limit)]


def find_turning(keys_PD: Tensor, positions: list[int]) -> Turning | None:
    """How one key at `positions` (see `probed_positions`) turns. No pairs where it does not move;
    None where it moves in another way."""
    keys_PD = keys_PD.double()
    moves = (keys_PD - keys_PD[0]).abs().amax(0) > 1e-7 * keys_PD[0].abs().mean()
    turning = moves.nonzero()[:, 0]
    if not len(turning):
        return Turning()
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


def _fitted(keys_PD: Tensor, positions: list[int], first: Tensor, second: Tensor) -> Turning | None:
    at = torch.complex(keys_PD[:, first], keys_PD[:, second])
    angle = (at / at[0]).angle()  # [P, pairs], modulo 2 pi
    speed = angle[1].clone()
    for row, position in enumerate(positions[1:], 1):
        expected = speed * position
        missing = angle[row] - expected
        missing = missing - (missing / (2 * torch.pi)).round() * 2 * torch.pi
        speed = (expected + missing) / position
    turned = torch.polar(torch.ones_like(angle), torch.tensor(positions)[:, None] * speed)
    error = (at / turned - at[0]).abs().norm(dim=1).amax() / at[0].abs().norm()
    if error > _TOLERANCE * max(1, positions[-1] / 4096):
        return None
    return Turning(tuple(first.tolist()), tuple(second.tolist()), tuple(speed.tolist()))
