"""Find the 4 scales per number of bits that `kv/voronoi.py` codes Gaussian blocks with.

    python tools/find_voronoi_betas.py [BITS ...]        about 20 s on one core for each

The squared errors of 262,144 random blocks of 8 under each of 96 scales, in steps of 3 %, are
computed once. From the 4 best in turn, each of the 4 is replaced by whichever of the 96 lowers the
mean over blocks of the smallest error, until none does. Steps of 3 % are fine enough: around the
minimum a step changes the error by less than 0.1 %.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from layersweep.kv.voronoi import best_points

BLOCKS, STEPS, STEP = 262_144, 96, 1.03


def errors(bits: int) -> tuple[list[float], Tensor]:
    """The scales, and the error per number of every block under each: [STEPS, BLOCKS]."""
    betas = [round(1.2 / 2**bits * STEP**step, 5) for step in range(STEPS)]
    u = torch.randn(BLOCKS, 8, generator=torch.Generator().manual_seed(bits)).t()[None]
    parts = u.split(4096, dim=2)
    rows = [torch.cat([best_points(part, bits, (beta,))[2][0] for part in parts]) for beta in betas]
    return betas, torch.stack(rows) / 8


def best_four(error: Tensor) -> list[int]:
    """Indices of the rows, ascending, whose elementwise minimum has the smallest mean."""
    chosen: list[int] = []
    for _ in range(4):
        chosen.append(_best_addition(error, chosen))
    while True:
        before = sorted(chosen)
        for place in range(4):
            others = chosen[:place] + chosen[place + 1 :]
            chosen[place] = _best_addition(error, others)
        if sorted(chosen) == before:
            return before


def _best_addition(error: Tensor, others: list[int]) -> int:
    base = error[others].amin(0) if others else torch.full_like(error[0], torch.inf)
    return int(torch.stack([torch.minimum(base, row).mean() for row in error]).argmin())


def main() -> None:
    for bits in [int(word) for word in sys.argv[1:]] or [1, 2, 3, 4, 5, 6, 8]:
        betas, error = errors(bits)
        four = best_four(error)
        values = ", ".join(f"{betas[index]:.4g}" for index in four)
        print(f"    {bits}: ({values}),  # {error[four].amin(0).mean():.5f}", flush=True)


if __name__ == "__main__":
    main()
