"""One result from the parts of several processes. Knows neither model nor text: a part brings the
facts of its study along, and the numbers of its sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layersweep.errors import InputError
from layersweep.runs.differences import differences
from layersweep.runs.finished import DamagedSweep, FinishedSweep, unpack
from layersweep.runs.record import Record, TileKey
from layersweep.runs.sections import measured_sections, now, verdict

Json = dict[str, Any]


@dataclass(frozen=True)
class ShardOutput:
    """What one process left in its folder `name`. `shard` as "1/2"; `sweeps` by file name."""

    name: str
    shard: str
    manifest: Json
    facts: Json
    results: Json
    sweeps: dict[str, bytes]


@dataclass(frozen=True)
class Merged:
    """The result of all parts together, and its numbers."""

    results: Json
    record: Record
    done: FinishedSweep

    @property
    def missing(self) -> list[TileKey]:
        """Tiles that no part has."""
        return [tile for tile in self.record.tiles if tile not in self.done.tiles]


def merge(parts: Sequence[ShardOutput], *, command: str) -> Merged:
    """Put parts of one study together.

    Status "partial" where tiles are missing, "gate_failed" where a part's gate failed. Raises
    InputError for parts of different studies, a tile that two parts have, and damaged files.
    """
    first = parts[0]
    names = [part.name for part in parts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"merge: found {min(twice)} twice, needed every folder once",
            hint="leave one of them out",
        )
    for other in parts[1:]:
        _check_same_study(first, other)
    record, done = _record(first), FinishedSweep([])
    owner: dict[TileKey, str] = {}
    for part in parts:
        for name, data in part.sweeps.items():
            sweep = _unpack(record, part, name, data)
            for tile in sweep.tiles:
                if tile in owner:
                    raise InputError(
                        f"{part.name}: found {tile.words}, which {owner[tile]} has, too; needed "
                        "every tile once",
                        hint="merge the shards of one --shard i/n series, each folder once",
                    )
                owner[tile] = part.name
            done.add(sweep)
    return Merged(_results(parts, record, done, command), record, done)


def _record(part: ShardOutput) -> Record:
    try:
        return Record.of(part.facts)
    except (KeyError, TypeError) as failure:
        raise InputError(
            f"{part.name}/study.json: found {type(failure).__name__} {failure}, needed the facts "
            "of a study as this version writes them",
            hint=f"run shard {part.shard} again with --resume: it writes the file anew",
        ) from failure


def _check_same_study(first: ShardOutput, other: ShardOutput) -> None:
    apart = differences(other.manifest, first.manifest)
    if not apart and other.facts != first.facts:
        apart = ["other windows or trials"]
    if apart:
        there_here = "; ".join(apart).replace(" here", f" in {first.name}")
        raise InputError(
            f"{other.name}: found another study than {first.name}: {there_here}",
            hint="merge parts that were computed with one command, the same files, versions and "
            "kind of device",
        )


def _unpack(record: Record, part: ShardOutput, name: str, data: bytes) -> FinishedSweep:
    try:
        return unpack(record, data)
    except DamagedSweep as failure:
        raise InputError(
            f"{part.name}/{name}: {failure}",
            hint=f"run shard {part.shard} again with --resume: it computes that sweep anew",
        ) from failure


def _results(
    parts: Sequence[ShardOutput], record: Record, done: FinishedSweep, command: str
) -> Json:
    about = parts[0].results
    failed = next((p.results for p in parts if p.results["status"] == "gate_failed"), None)
    complete = all(tile in done.tiles for tile in record.tiles)
    status = "gate_failed" if failed else "complete" if complete else "partial"
    gates = [part.results["gate"] for part in parts if part.results["gate"]]
    fallbacks = [fallback for part in parts for fallback in part.results["fallbacks"]]
    measured = measured_sections(record, done)
    return {
        **about,
        "status": status,
        **verdict(status, record, done, measured, about["model"]["weights"]),
        "created": now(),
        "command": command,
        "fallbacks": [f for index, f in enumerate(fallbacks) if f not in fallbacks[:index]],
        "gate": failed["gate"] if failed else gates[0] if gates else done.gate,
        **measured,
        "performance": merge_performance(
            [part.results["performance"] for part in parts],
            [{"shard": part.shard, "command": part.results["command"]} for part in parts],
        ),
    }


ADDED = ("sweeps", "gate_sweeps", "weight_bytes_read", "h2d_bytes", "tokens", "resumed_tiles")
LONGEST = ("wall_s", "compute_stall_fraction", "peak_device_bytes", "planned_device_bytes",
           "planned_s", "vram_budget")  # fmt: skip
SUMMED = ("flops", "gemm_ceiling_tflops", "h2d_gbps", "peak_host_bytes", "ram_budget")


def merge_performance(of: Sequence[Json], shards: Sequence[Json]) -> Json:
    """Performance of processes that ran side by side: work and rates add up, the longest time and
    the highest device count. `shards` names each; their own figures stay beside them."""

    def known(name: str) -> list[Any]:
        return [one[name] for one in of if one.get(name) is not None]

    phases = {name: None for one in of for name in one["phases"]}
    times = [one["flops"] / one["achieved_tflops"] / 1e12 for one in of if one["achieved_tflops"]]
    flops, ceiling = sum(known("flops")), sum(known("gemm_ceiling_tflops"))
    achieved = flops / max(times) / 1e12 if times else None
    return {
        "phases": {
            name: max(one["phases"][name] for one in of if name in one["phases"]) for name in phases
        },
        **{name: sum(known(name)) for name in ADDED},
        **{name: sum(known(name)) if known(name) else None for name in SUMMED},
        **{name: max(known(name), default=None) for name in LONGEST},
        "achieved_tflops": achieved,
        "mfu": achieved / ceiling if achieved and ceiling else None,
        "shards": [{**name, **one} for name, one in zip(shards, of, strict=True)],
    }
