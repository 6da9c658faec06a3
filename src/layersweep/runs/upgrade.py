"""Results that an earlier version wrote, as this one would have written them.

`layersweep.results/1` has every window's losses: what /2 says of them is computed anew, by the
same functions. It does not say where haystacks lie, so what needs that is null.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from layersweep.runs.versions import METRICS_VERSION, SCHEMA
from layersweep.statistics.groups import group_windows
from layersweep.tasks.arms import BASELINE
from layersweep.tasks.needle.summary import counts
from layersweep.tasks.perplexity.noise import largest
from layersweep.tasks.perplexity.summary import compare_arms, compare_pairs, window_losses

Json = dict[str, Any]


def upgraded(results: Json) -> Json:
    """A /1 object as /2. Raises KeyError, TypeError or ValueError for what is no such object."""
    perplexity, needle = results["perplexity"], results["needle"]
    seed = results["protocol"]["seed"]
    return results | {
        "schema": SCHEMA,
        "metrics_version": METRICS_VERSION,
        "perplexity": perplexity and _perplexity(perplexity, seed),
        "needle": needle and _needle(needle),
    }


def _perplexity(section: Json, seed: int) -> Json:
    segments, arms = section["segments"], section["arms"]
    usable = [arm["arm"] for arm in arms if arm["status"] == "ok"]
    nll = {
        arm: np.array([segment["nll"][arm] for segment in segments], dtype=np.float64)
        for arm in (BASELINE, *usable)
    }
    groups = group_windows([segment["article"] for segment in segments])
    floor = _noise_floor(section["noise_floor"])
    methods = {arm["arm"]: arm["method"] for arm in arms}
    compared = compare_arms(nll, groups, methods, floor, seed=seed)
    unknown = dict.fromkeys(("n_worse", "p_flip", "p_sign_iid", "p_wilcoxon_iid"))
    return section | {
        "groups": {"kind": groups.kind, "count": groups.count},
        "noise_floor": floor,
        "arms": [
            _without(arm, "p_sign", "p_wilcoxon") | compared.get(arm["arm"], unknown)
            for arm in arms
        ],
        "pairs": compare_pairs(nll, groups, seed=seed),
        "segments": [segment | window_losses(segment["nll"]) for segment in segments],
    }


def _noise_floor(floor: Json) -> Json:
    exact, identity = floor["exact"], floor["identity"]
    by_method = identity["by_method"] if identity else {}
    return {
        "exact": exact and _noise(exact),
        "identity": largest({method: _noise(noise) for method, noise in by_method.items()}),
    }


def _noise(noise: Json) -> Json:
    """mean(delta^2) = mean^2 + sd^2 (n - 1) / n."""
    n, sd = noise["n"], noise["sd"] or 0.0
    return noise | {"rms": (noise["mean"] ** 2 + sd**2 * (n - 1) / n) ** 0.5}


def _needle(section: Json) -> Json:
    trials = [trial | {"haystack": None} for trial in section["trials"]]
    settings = [(trial["context"], trial["depth"]) for trial in trials]
    return section | {
        "groups": None,
        "arms": [
            _without(arm, "mcnemar_p")
            | {"p_flip": None, "p_mcnemar_iid": arm["mcnemar_p"], "answer_nll_sem": None}
            | counts(settings, [trial["correct"][arm["arm"]] for trial in trials])
            for arm in section["arms"]
        ],
        "trials": trials,
    }


def _without(mapping: Json, *names: str) -> Json:
    return {name: value for name, value in mapping.items() if name not in names}
