"""Several processes on one study, each with a folder of its own in OUT/shards, and one result.

No process waits for another, and none is told what others do: each knows its tiles by arithmetic
(runs/shard.py). Whoever finds all parts there puts them together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from layersweep.cli.job import Job, compute
from layersweep.errors import InputError
from layersweep.runs.folder import MANIFEST, RESULTS, SHARDS, read_part, write_merged
from layersweep.runs.shard import Shard

Say = Callable[[str], None]


def compute_rank(job: Job, shard: Shard, say: Say) -> dict[str, Any] | None:
    """The part of a process that torchrun or srun has started; who finds all tiles done returns the
    results, the others None."""
    if job.out is None:
        raise InputError(
            f"{shard.source}: found process {shard} of a study without --out, needed a folder that "
            "all of them see",
            hint="--out DIR; or unset RANK and WORLD_SIZE to compute the whole study here",
        )
    compute(in_shards(job, shard), shard)
    results = collect(job, shard.of, say)
    return None if results and results["status"] == "partial" else results


def in_shards(job: Job, shard: Shard) -> Job:
    """`job`, written to the folder of a shard."""
    assert job.out is not None
    check_counts(job.out, shard.of)
    return replace(job, out=job.out / SHARDS / shard.folder)


def check_counts(out: Path, of: int) -> None:
    """Raises InputError where `out` holds a run of another number of processes."""
    if (out / MANIFEST).exists() and not (out / SHARDS).exists():
        raise InputError(
            f"--out {out}: found a run of one process, needed a folder without, or one of {of}",
            hint="go on with that run on one device; or name another folder",
        )
    others = sorted(
        {path.name.partition("-of-")[2] for path in (out / SHARDS).glob("*-of-*")} - {str(of)}
    )
    if others:
        raise InputError(
            f"--out {out}: found the shards of a run of {others[0]} processes, needed {of}",
            hint=f"go on with {others[0]} processes; or name another folder",
        )


def collect(job: Job, of: int, say: Say) -> dict[str, Any] | None:
    """Put the parts in OUT/shards together, if all are there, and write OUT's own results.

    Returns None while a process has not come to its end, or not all tiles are done there: with
    --stop-after, OUT/results.json is then of status "partial".
    """
    from layersweep.report.files import write_report
    from layersweep.report.store import load_results
    from layersweep.runs.files import lock, writing
    from layersweep.runs.merge import merge

    assert job.out is not None
    folders = _folders(job.out, of)
    handle = lock(job.out, say, wait=True)
    try:
        there = [folder for folder in folders if (folder / RESULTS).is_file()]
        if len(there) < of:
            say(f"note: {len(there)} of {of} parts are at their end in {job.out}/shards")
            return None
        parts = [read_part(folder, load_results) for folder in folders]
        merged = merge(parts, command=job.command)
        with writing(job.out):
            write_merged(job.out, merged, folders)
            write_report(job.out, merged.results)
    finally:
        os.close(handle)
    if merged.missing:
        done = len(merged.record.tiles) - len(merged.missing)
        say(f"note: {done} of {len(merged.record.tiles)} tiles are done; --resume continues")
    else:
        say(f"wrote {job.out}/results.json, report.html, windows.csv")
    return merged.results


def keep_refusal(job: Job, of: int) -> None:
    """The results of a part whose gate failed are those of the whole run."""
    from layersweep.report.files import write_report
    from layersweep.report.store import load_results
    from layersweep.runs.files import writing

    assert job.out is not None
    for folder in _folders(job.out, of):
        if (folder / RESULTS).is_file():
            results = load_results(folder)
            if results["status"] == "gate_failed":
                with writing(job.out):
                    write_report(job.out, {**results, "command": job.command})


def _folders(out: Path, of: int) -> list[Path]:
    return [out / SHARDS / Shard(number + 1, of).folder for number in range(of)]
