"""How often each p of results.json falls to 5 % where nothing differs: simulated studies.

    python tools/measure_tests.py [--studies 2000]      some minutes; a JSON line per case

Deltas are normal with mean 0 and AR(1): each window correlates by rho with the one before, anew in
each article of the bundled text, or through the whole text where it has no headings (blocks of 4).
`Holm over 4 arms` counts studies of independent arms in which any arm falls to 5 %, `Holm over 6
pairs` those in which any of their differences does. `Wilcoxon, iid` and `McNemar, iid` are in
results.json under that name; no report prints them. Needles lie in overlapping haystacks of 4,096
tokens in a text of 160,000; a fifth is lost or gained, and two that share all their text agree by
rho. The exit code is 1 where a printed p falls to 5 % in less than 3 % or more than 7 % of the
studies.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from measure_coverage import ar1, groupings

from layersweep.statistics.groups import Floats, Groups, Ints, group_haystacks
from layersweep.statistics.significance import (
    flip_test,
    holm,
    mcnemar_exact_iid,
    wilcoxon_test_iid,
)

LEVEL = 0.05
LOWEST, HIGHEST = 0.03, 0.07
RHOS = (0.0, 0.3, 0.5)
WINDOWS = (60, 80)
ARMS = 4
DRAWS = 1000  # of flips: p of 5 % is then known to 0.7 %
NEEDLES = (60, 200)
TEXT, CONTEXT = 160_000, 4096
GOLDEN = (math.sqrt(5) - 1) / 2
OF_WINDOWS = ("sign flips", "Holm over 4 arms", "Holm over 6 pairs", "Wilcoxon, iid")
OF_NEEDLES = ("sign flips", "McNemar, iid")
NOT_PRINTED = "iid"

Counts = dict[str, int]


def count_windows(groups: Groups, stretches: Ints, rho: float, studies: int) -> Counts:
    """Studies in which a p is at most 5 %, per test; each study has its own seed."""
    draw, found = ar1(rho), dict.fromkeys(OF_WINDOWS, 0)
    for seed in range(studies):
        # not the seed of the flips, which would draw the very same numbers
        rng = np.random.default_rng([seed, 1])
        arms = [draw(rng, stretches) for _ in range(ARMS)]
        pairs = [a - b for a, b in combinations(arms, 2)]
        p_arms, p_pairs = (
            [flip_test(deltas, groups, seed=seed, draws=DRAWS) for deltas in some]
            for some in (arms, pairs)
        )
        found["sign flips"] += p_arms[0] <= LEVEL
        found["Holm over 4 arms"] += min(holm(p_arms)) <= LEVEL
        found["Holm over 6 pairs"] += min(holm(p_pairs)) <= LEVEL
        found["Wilcoxon, iid"] += (wilcoxon_test_iid(arms[0]) or 1.0) <= LEVEL
    return found


def count_needles(needles: int, rho: float, studies: int) -> Counts:
    """The same for needles lost and gained; what two share of their text is what they agree in."""
    phases = (np.arange(needles) * GOLDEN) % 1.0
    begins = (phases * (TEXT - CONTEXT)).astype(int)
    groups = group_haystacks([(begin, begin + CONTEXT) for begin in begins.tolist()])
    found = dict.fromkeys(OF_NEEDLES, 0)
    for seed in range(studies):
        rng = np.random.default_rng([seed, 1])
        verdicts = needle_verdicts(rng, begins, rho)
        lost, gained = int((verdicts < 0).sum()), int((verdicts > 0).sum())
        p = flip_test(verdicts, groups, seed=seed, draws=DRAWS, counts=True)
        found["sign flips"] += p <= LEVEL
        found["McNemar, iid"] += mcnemar_exact_iid(lost, gained) <= LEVEL
    return found


def needle_verdicts(rng: np.random.Generator, begins: Ints, rho: float) -> Floats:
    """-1 lost, 0 as with the exact cache, 1 gained, for haystacks of CONTEXT tokens."""
    walk = np.concatenate(([0.0], np.cumsum(rng.standard_normal(TEXT))))
    of_text = (walk[begins + CONTEXT] - walk[begins]) / math.sqrt(CONTEXT)
    latent = math.sqrt(rho) * of_text + math.sqrt(1 - rho) * rng.standard_normal(len(begins))
    verdicts: Floats = np.sign(latent) * (rng.random(len(begins)) < 0.2)
    return verdicts


def cases(studies: int) -> Iterator[Mapping[str, Any]]:
    """A line per design, size and correlation, with the rate of every test."""
    for rho in RHOS:
        for windows in WINDOWS:
            for groups, stretches in groupings(windows):
                started = time.perf_counter()
                rates = count_windows(groups, stretches, rho, studies)
                yield _line(groups, windows, rho, studies, rates, started)
        for needles in NEEDLES:
            started = time.perf_counter()
            groups = group_haystacks([(0, CONTEXT), (TEXT, TEXT + CONTEXT)])
            rates = count_needles(needles, rho, studies)
            yield _line(groups, needles, rho, studies, rates, started)


def _line(
    groups: Groups, n: int, rho: float, studies: int, counts: Counts, started: float
) -> Mapping[str, Any]:
    return {
        "false_positives": {name: count / studies for name, count in counts.items()},
        "grouping": groups.kind,
        "n": n,
        "rho": rho,
        "studies": studies,
        "seconds": round(time.perf_counter() - started, 1),
    }


def out_of_bounds(line: Mapping[str, Any]) -> list[str]:
    """The printed tests of a line that err too often or too seldom."""
    return [
        name
        for name, rate in line["false_positives"].items()
        if NOT_PRINTED not in name and not LOWEST <= rate <= HIGHEST
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", type=int, default=2000)
    missed = False
    for line in cases(parser.parse_args().studies):
        missed |= bool(out_of_bounds(line))
        print(json.dumps(line), flush=True)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
