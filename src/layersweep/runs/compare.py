"""Two runs of one model under one protocol, window by window.

Windows are paired by the hash of their tokens, never by position. What would make the difference
mean something else (another model, text handling, precision) is refused, not averaged over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from layersweep.errors import InputError
from layersweep.statistics.groups import group_windows
from layersweep.statistics.paired import PairedStatistics, paired_statistics
from layersweep.statistics.significance import holm
from layersweep.tasks.arms import BASELINE

Json = dict[str, Any]

SAME_MODEL = ("fingerprint", "architecture", "weights", "router")
SAME_PROTOCOL = (
    *("tokenizer_sha256", "bos_id", "prefix", "continuation", "cache_mode"),
    *("dtype", "kv_dtype", "router_dtype"),
)


@dataclass(frozen=True)
class ArmComparison:
    """Second run minus first, on the common windows. `equal`: windows with the same NLL bits."""

    arm: str
    paired: PairedStatistics
    equal: int
    largest: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """`common` windows of `windows` = (first, second); `missing` names arms in one run only."""

    common: int
    windows: tuple[int, int]
    arms: tuple[ArmComparison, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare_runs(first: Json, second: Json) -> Comparison:
    """Paired differences (second - first) of the baselines and of every arm in both runs.

    Raises InputError when models or protocols differ (each difference is named), when one run
    has no perplexity, or when no window is common.
    """
    _refuse_mismatch(first, second)
    windows_a, windows_b = _by_hash(first), _by_hash(second)
    common = [sha for sha in windows_a if sha in windows_b]
    if not common:
        raise InputError(
            "the two runs share no window: found no token hash in both, needed at least one",
            hint="use the same --text and the same --bos in both runs",
        )
    arms_a, arms_b = _arms(first), _arms(second)
    groups = group_windows([windows_a[sha]["article"] for sha in common])
    found = []
    for arm in (arm for arm in arms_a if arm in arms_b):
        pairs = [(windows_a[sha]["nll"][arm], windows_b[sha]["nll"][arm]) for sha in common]
        deltas = np.array([there - here for here, there in pairs], dtype=np.float64)
        seed = first["protocol"]["seed"]
        found.append((arm, deltas, paired_statistics(deltas, groups, seed=seed)))
    adjusted = holm([paired.p_flip for _, _, paired in found])
    return Comparison(
        common=len(common),
        windows=(len(windows_a), len(windows_b)),
        arms=tuple(
            ArmComparison(arm, paired, int((deltas == 0).sum()), float(np.abs(deltas).max()), p)
            for (arm, deltas, paired), p in zip(found, adjusted, strict=True)
        ),
        only_first=tuple(arm for arm in arms_a if arm not in arms_b),
        only_second=tuple(arm for arm in arms_b if arm not in arms_a),
    )


def _refuse_mismatch(first: Json, second: Json) -> None:
    for name, results in (("first", first), ("second", second)):
        if results["perplexity"] is None:
            raise InputError(
                f"the {name} run has no perplexity, needed one to pair windows",
                hint="run the evaluation with --tasks ppl",
            )
    differing = [
        f"model.{key}: {_show(first['model'][key])} and {_show(second['model'][key])}"
        for key in SAME_MODEL
        if first["model"][key] != second["model"][key]
    ]
    differing += [
        f"protocol.{key}: {_show(first['protocol'][key])} and {_show(second['protocol'][key])}"
        for key in SAME_PROTOCOL
        if first["protocol"][key] != second["protocol"][key]
    ]
    if first["metrics_version"] != second["metrics_version"]:
        versions = f"{first['metrics_version']} and {second['metrics_version']}"
        differing.append(f"metrics_version: {versions}")
    if differing:
        raise InputError(
            f"the two runs cannot be paired: found {'; '.join(differing)}; needed the same",
            hint="repeat one of the runs with the settings of the other",
        )


def _by_hash(results: Json) -> dict[str, Json]:
    return {segment["tokens_sha"]: segment for segment in results["perplexity"]["segments"]}


def _arms(results: Json) -> list[str]:
    """The baseline and every arm without a non-finite window."""
    usable = [arm["arm"] for arm in results["perplexity"]["arms"] if arm["status"] == "ok"]
    return [BASELINE, *usable]


def _show(value: object) -> str:
    words = str(value)
    return words if len(words) <= 24 else f"{words[:12]}\u2026"
