"""The tokens that every tiny model is asked about, and what an answer is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PREFIX, CONTINUATION = 48, 32  # both longer than the window of 24
NEEDLE_PREFIX, NEEDLE_BRANCH, NEEDLE_ANSWER = 70, 9, 4
WINDOWS = 2
QUESTION, STEPS = 8, 4  # of a continuation: at once, and then a token at a time


def window_ids(vocab: int) -> Tensor:
    """[WINDOWS, PREFIX + CONTINUATION]"""
    return _draw((WINDOWS, PREFIX + CONTINUATION), vocab, seed=1)


def needle_ids(vocab: int) -> Tensor:
    """[NEEDLE_PREFIX + NEEDLE_BRANCH]: a haystack; question and answer."""
    return _draw((NEEDLE_PREFIX + NEEDLE_BRANCH,), vocab, seed=2)


def _draw(shape: tuple[int, ...], vocab: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, shape, generator=generator)  # no bos, eos, pad


@dataclass(frozen=True)
class Losses:
    """Losses of tokens: of each window's continuation but its first, [WINDOWS, CONTINUATION - 1],
    and of the needle's answer, [NEEDLE_ANSWER]."""

    windows: Tensor
    needle: Tensor

    def distances(self, other: Losses) -> tuple[float, float]:
        """The largest difference of a window's mean loss, and that of the answer's."""
        windows = self.windows.double().mean(1) - other.windows.double().mean(1)
        needle = self.needle.double().mean() - other.needle.double().mean()
        return windows.abs().max().item(), needle.abs().item()

    def distance(self, other: Losses) -> float:
        """The larger of both; NaN where either is."""
        return torch.tensor(self.distances(other)).max().item()
