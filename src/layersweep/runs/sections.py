"""What a run's numbers come to in results.json: a section per task, and whether to publish them."""

from __future__ import annotations

from datetime import UTC, datetime

from layersweep.runs.finished import FinishedSweep
from layersweep.runs.record import Json, Record
from layersweep.tasks.finite import finite
from layersweep.tasks.registry import TASKS
from layersweep.tasks.task import Numbers


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def measured_sections(record: Record, done: FinishedSweep) -> Json:
    """A section per task, None for one that was not asked for or has tiles that are not done."""
    unfinished = {tile.task for tile in record.tiles if tile not in done.tiles}
    sections: Json = {kind.name: None for kind in TASKS}
    for name, numbers in record.numbers.items():
        if name not in unfinished:
            bits = _bits(name, numbers, done)
            sections[name] = numbers.summarize(bits, set(done.nonfinite), record.seed)
    return sections


def verdict(status: str, record: Record, done: FinishedSweep, measured: Json, weights: str) -> Json:
    """`publishable` and `reasons`."""
    reasons = reasons_not_publishable(status=status, weights=weights, measured=measured)
    if status == "partial":
        finished = sum(tile in done.tiles for tile in record.tiles)
        reasons.insert(0, f"{finished} of {len(record.tiles)} tiles are done")
    return {"publishable": not reasons, "reasons": reasons}


def reasons_not_publishable(*, status: str, weights: str, measured: Json) -> list[str]:
    """What a run lacks to be published, in sentences for people; empty when nothing is missing.

    `measured`: sections by task, None for one that was not asked for.
    """
    reasons = []
    if status != "complete":
        reasons.append(f"the run is not complete (status: {status})")
    if weights == "synthetic":
        reasons.append("the weights are synthetic")
    found = [(kind, measured[kind.name]) for kind in TASKS if measured[kind.name] is not None]
    if not found:
        reasons.append("nothing was measured")
    for kind, section in found:
        reasons += kind.missing(section)
    return reasons


def _bits(task: str, numbers: Numbers, done: FinishedSweep) -> dict[str, float | None]:
    """Measured bits per element of each arm's caches: averaged over layers, keys and values, items.
    None where nothing was measured, or somebody's own codec does not say what it stores."""
    found: dict[str, float | None] = {}
    for arm in numbers.arm_names:
        bits, elements = done.cache_bits.get((task, arm), [0.0, 0.0])
        found[arm] = finite(bits / elements) if elements else None
    return found
