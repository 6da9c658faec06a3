"""`layersweep eval --rehearse N`: everything of a study that needs no second of a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from layersweep.errors import InputError
from layersweep.units import format_bytes

if TYPE_CHECKING:
    from layersweep.cli.job import Job
    from layersweep.study.rehearsal import Rehearsal


def rehearse_study(job: Job, layers: int) -> None:
    """Rehearse and say what was seen. Raises InputError with --out: there is nothing to keep."""
    if job.out is not None:
        raise InputError(
            f"--rehearse {layers}: found --out {job.out}, needed none: a rehearsal leaves no "
            "numbers",
            hint="leave --out out",
        )
    from layersweep.cli.events import Events, layout_line, paths_line, versions_line
    from layersweep.kv.arms import parse_arms
    from layersweep.study.rehearsal import rehearse

    parse_arms(job.settings.kv, growing=job.settings.streaming)
    from layersweep.sweep.model import load

    events = Events(Console(stderr=True))
    loaded = load(job.source, **asdict(job.machine))
    events.say(layout_line(loaded.checkpoint))
    seen = rehearse(loaded, job.settings, layers)
    events.say(paths_line(seen.study.model, seen.study.plan.host))
    events.say(versions_line())
    for line in _lines(seen):
        typer.echo(line)


def _lines(seen: Rehearsal) -> list[str]:
    from layersweep.tasks.registry import BY_NAME

    study = seen.study
    bos = "none" if study.bos_id is None else f"id {study.bos_id}"
    return [
        f"text: {study.text.source}, sha256 {study.text.sha256[:16]}...; BOS {bos}",
        f"tokenized: {', '.join(f'{n} {BY_NAME[task].items}' for task, n in seen.items.items())}, "
        f"{seen.tokens} tokens",
        f"arms: exact, {', '.join(arm.name for arm in study.arms)}",
        f"gate: {seen.layers} of {seen.of_layers} layers with their weights "
        f"({format_bytes(seen.weight_bytes_read)} read), {len(seen.checks)} checks passed: "
        + ", ".join(sorted({check.name for check in seen.checks})),
        "not rehearsed: the gate's losses, which need every layer; kernels and memory of a GPU",
    ]
