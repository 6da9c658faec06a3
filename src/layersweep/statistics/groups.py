"""Which measurements resemble each other and count as one: windows of an article, needles in one
stretch of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK_WINDOWS = 4
STRETCH_HAYSTACKS = 4
ENOUGH_ARTICLES = 8  # a spread over fewer groups than this says little about itself


@dataclass(frozen=True)
class Groups:
    """`labels` [n] numbers the group of each measurement, in text order.

    Articles are about different things. Blocks cut one text: neighbouring blocks correlate.
    Stretches of text are so much longer than what is measured in them that their neighbours
    hardly do.
    """

    kind: Literal["articles", "blocks", "stretches"]
    labels: Ints

    @property
    def count(self) -> int:
        return len(np.unique(self.labels))


def group_windows(articles: Sequence[str | None]) -> Groups:
    """Windows [n] by article (text heading), or in blocks of 4.

    Headings are used when they give at least 8 groups, or at least as many as the blocks would;
    a text with one or two headings would otherwise have no usable spread. Windows without a
    heading in a text that has some are grouped in blocks.
    """
    blocks = [index // BLOCK_WINDOWS for index in range(len(articles))]
    named = [
        f"article {name}" if name is not None else f"block {block}"
        for name, block in zip(articles, blocks, strict=True)
    ]
    has_headings = any(name is not None for name in articles)
    enough = len(set(named)) >= min(ENOUGH_ARTICLES, len(set(blocks)))
    if not (has_headings and enough):
        return Groups("blocks", np.asarray(blocks, dtype=np.int64))
    order = {label: position for position, label in enumerate(dict.fromkeys(named))}
    return Groups("articles", np.asarray([order[label] for label in named], dtype=np.int64))


def group_haystacks(ranges: Sequence[tuple[int, int]]) -> Groups:
    """Haystacks [n], each a range (begin, end) of one text, by the stretch in which they begin.

    A stretch is four haystacks long. Haystacks that share text lie in one stretch or in
    neighbouring ones: of two neighbours' sums, at most 5 % of the variance is then shared
    (tools/measure_tests.py).
    """
    length = STRETCH_HAYSTACKS * max((end - begin for begin, end in ranges), default=1)
    return Groups("stretches", np.asarray([begin // length for begin, _ in ranges], dtype=np.int64))


def group_sums(values: Floats, labels: Ints) -> tuple[Floats, Floats]:
    """Sum of the values and number of measurements per group, both [G]."""
    _, positions = np.unique(labels, return_inverse=True)
    sums = np.bincount(positions, weights=values).astype(np.float64)
    return sums, np.bincount(positions).astype(np.float64)
