"""Write src/layersweep/kv/lloyd_tables.py: Lloyd-Max levels for the unit Gaussian.

A level must be the mean of its cell and a boundary the midpoint of its two levels. 300 rounds of
the classic alternation bring the levels close, Newton's method on the remaining error finishes
(the alternation alone would need about a million rounds for 256 levels).

    python tools/make_lloyd_tables.py > src/layersweep/kv/lloyd_tables.py
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr
from scipy.stats import norm

BITS = (1, 2, 3, 4, 5, 6, 8)


def cells(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lower edge, upper edge, mass and mean of every positive cell of a unit Gaussian."""
    inner = (levels[:-1] + levels[1:]) / 2
    low, high = np.concatenate([[0.0], inner]), np.concatenate([inner, [np.inf]])
    mass = ndtr(-low) - ndtr(-high)  # the upper tail keeps its digits, the lower one would not
    return low, high, mass, (norm.pdf(low) - norm.pdf(high)) / mass


def error_slope(levels: np.ndarray) -> np.ndarray:
    """Jacobian of levels - means(levels): tridiagonal, written densely."""
    low, high, mass, mean = cells(levels)
    by_low = norm.pdf(low) * (mean - low) / mass / 2
    by_high = norm.pdf(high[:-1]) * (high[:-1] - mean[:-1]) / mass[:-1] / 2
    slope = np.eye(len(levels))
    for i in range(len(levels)):
        if i > 0:  # the lower edge moves with this level and the one below
            slope[i, i] -= by_low[i]
            slope[i, i - 1] -= by_low[i]
        if i + 1 < len(levels):
            slope[i, i] -= by_high[i]
            slope[i, i + 1] -= by_high[i]
    return slope


def solve(bits: int) -> np.ndarray:
    count = 2 ** (bits - 1)
    # Start from the density that is optimal for many levels: the cube root of the Gaussian.
    levels = norm.ppf(0.5 + (np.arange(count) + 0.5) / (2 * count)) * np.sqrt(3.0)
    for _ in range(300):
        levels = cells(levels)[3]
    for _ in range(50):
        error = levels - cells(levels)[3]
        levels = levels - np.linalg.solve(error_slope(levels), error)
    assert np.abs(levels - cells(levels)[3]).max() < 1e-13
    return levels


def main() -> None:
    print('"""Lloyd-Max levels for the unit Gaussian: the positive half, ascending, per bits.\n')
    print("Written by tools/make_lloyd_tables.py; constants, so that every machine decodes alike.")
    print('"""\n\nfrom __future__ import annotations\n')
    print("POSITIVE_LEVELS: dict[int, tuple[float, ...]] = {")
    for bits in BITS:
        print(f"    {bits}: (")
        values = [f"{np.float32(level):.9g}" for level in solve(bits)]
        for start in range(0, len(values), 7):
            print("        " + ", ".join(values[start : start + 7]) + ",")
        print("    ),")
    print("}")


if __name__ == "__main__":
    main()
