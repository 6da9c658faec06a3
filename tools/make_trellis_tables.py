"""Train the levels of the trellis codec: writes src/layersweep/kv/trellis_tables.safetensors.

    python tools/make_trellis_tables.py [--only L,bits ...]      half an hour on two cores

Lloyd's algorithm with the trellis search in the place of the nearest level: search the best
symbols of random vectors, then move the level of every state to the mean of the numbers that it
stands for. Starts are random, with the 2^bits successors of a group drawn from different parts of
the Gaussian; the best of several starts is refined on more vectors. Where a symbol is a whole
state (8 bits) there is no choice of path, and the levels are those of Lloyd and Max. The vectors
are what the codec feeds to its search: Gaussian, of rms 1 up to the rounding of the scale.

The file holds, for every L and bits, `levels.L.bits` float32 [2^L] and `distortion.L.bits` float64,
the mean squared error over the energy of vectors of 128 that were not trained on.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layersweep.kv.lloyd import signed_levels
from layersweep.kv.trellis_search import search, states_of

TARGET = Path(__file__).parents[1] / "src/layersweep/kv/trellis_tables.safetensors"
DIM = 128
CODES = [*((8, bits) for bits in (1, 2, 3, 4, 5, 6, 8)), *((10, bits) for bits in (1, 2, 3, 4))]
STEPS_PER_OCTAVE = 8  # of the stored scale
SPREAD = {5: 1.15, 6: 1.3}  # of the first levels: many levels want to be wider apart at the ends


def draw(count: int, generator: torch.Generator) -> Tensor:
    """[D, count] float32 of rms 2^x, x uniform over half a step of the scale to either side."""
    u = torch.randn(DIM, count, generator=generator)
    off = torch.rand(count, generator=generator) - 0.5
    return u / u.square().mean(0).sqrt() * torch.exp2(off / STEPS_PER_OCTAVE)


def start(window: int, bits: int, generator: torch.Generator) -> Tensor:
    """Quantiles of the Gaussian, one from each of 2^bits slices for the successors of a group."""
    states, symbols = 2**window, 2**bits
    parts = (torch.arange(states, dtype=torch.float64) + 0.5) / states
    slices = torch.special.ndtri(parts).float().view(symbols, -1) * SPREAD.get(bits, 1.0)

    def shuffled(row: Tensor) -> Tensor:
        return row[torch.randperm(len(row), generator=generator)]

    groups = torch.stack([shuffled(row) for row in slices], dim=1)
    return torch.stack([shuffled(group) for group in groups]).flatten()


def improve(levels: Tensor, bits: int, u: Tensor) -> tuple[Tensor, float]:
    """Moved levels, and the distortion of the given ones."""
    states = states_of(search(u, levels, bits), len(levels), bits).flatten().long()
    numbers = u.flatten().double()
    count = torch.bincount(states, minlength=len(levels))
    total = torch.bincount(states, weights=numbers, minlength=len(levels))
    error = (levels.double()[states] - numbers).square().sum() / numbers.square().sum()
    moved = torch.where(count > 0, total / count.clamp(min=1), levels.double())
    return moved.float(), error.item()


def train(window: int, bits: int) -> tuple[Tensor, float]:
    """Levels and their distortion on fresh vectors."""
    final = draw(64000, torch.Generator().manual_seed(3))
    if window == bits:
        levels = signed_levels(bits, torch.device("cpu"))
        return levels, improve(levels, bits, final)[1]
    size = 2 ** max(0, window - 8)
    starts = max(1, 32 // size**2)
    fresh = draw(8000 * size, torch.Generator().manual_seed(1))
    best, least = torch.empty(0), math.inf
    for seed in range(starts):
        generator = torch.Generator().manual_seed(1000 + seed)
        levels = start(window, bits, generator)
        for _ in range(200):
            levels, _ = improve(levels, bits, draw(2000 * size, generator))
        error = improve(levels, bits, fresh)[1]
        if error < least:
            best, least = levels, error
    generator = torch.Generator().manual_seed(2)
    for count in (8000, 16000, 32000):
        for _ in range(30):
            best, _ = improve(best, bits, draw(count * size, generator))
    return best, improve(best, bits, final)[1]


def run(code: tuple[int, int]) -> tuple[int, int, Tensor, float]:
    torch.set_num_threads(1)  # codes run side by side; threads would wait for each other
    return *code, *train(*code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help="for example 8,2")
    wanted = parser.parse_args().only
    tables = load_file(TARGET) if wanted and TARGET.exists() else {}
    codes = [code for code in CODES if not wanted or f"{code[0]},{code[1]}" in wanted]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for window, bits, levels, error in pool.map(run, codes):
            tables[f"levels.{window}.{bits}"] = levels
            tables[f"distortion.{window}.{bits}"] = torch.tensor(error, dtype=torch.float64)
            print(f"2^{window} states, {bits} bits: {error:.6f}", flush=True)
            save_file(tables, TARGET)


if __name__ == "__main__":
    main()
