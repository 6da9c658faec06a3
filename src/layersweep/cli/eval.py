"""`layersweep eval`: what does a quantized KV cache cost this model?"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from layersweep.cli.command import command_line
from layersweep.cli.job import Job, MachineOptions, compute
from layersweep.errors import InputError
from layersweep.units import parse_duration

DEFAULT_DEPTHS = "0.05,0.15,0.25,0.35,0.45,0.55,0.65,0.75,0.85,0.95"


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or demo.")] = "demo",
    kv: Annotated[str, typer.Option(help="Arms besides `exact`.")] = "K3V2,K4V2",
    tasks: Annotated[str, typer.Option(help="ppl, niah, or both.")] = "ppl,niah",
    text: Annotated[str | None, typer.Option(help="Text file for windows and haystacks.")] = None,
    segments: Annotated[str, typer.Option(help="Perplexity windows, or all.")] = "80",
    prefix: Annotated[int, typer.Option(help="Tokens that pass through the codec.")] = 1024,
    continuation: Annotated[int, typer.Option(help="Tokens scored after them.")] = 512,
    bos: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    cache_mode: Annotated[str, typer.Option(help="prefill or streaming.")] = "prefill",
    niah_context: Annotated[str, typer.Option(help="Needle contexts in tokens.")] = "4096",
    niah_depths: Annotated[str, typer.Option(help="Needle depths, 0 to 1.")] = DEFAULT_DEPTHS,
    niah_per_depth: Annotated[int, typer.Option(help="Needles per context and depth.")] = 6,
    niah_keys: Annotated[int, typer.Option(help="Needles per haystack, one is asked for.")] = 1,
    niah_mode: Annotated[str, typer.Option(help="teacher or generate.")] = "teacher",
    gate: Annotated[str, typer.Option(help="first, only or off.")] = "first",
    vram: Annotated[str, typer.Option(help="Device budget, for example 14GiB.")] = "auto",
    ram: Annotated[str, typer.Option(help="Host budget.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N, or cuda:0,cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    router_dtype: Annotated[str, typer.Option(help="float32 or hidden.")] = "float32",
    assume_capability: Annotated[
        str | None, typer.Option(help="Take the paths of an older GPU, for example 7.5.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; none: no files.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    shard: Annotated[str | None, typer.Option(help="Compute part i of n, for example 2/8.")] = None,
    stop_after: Annotated[
        str | None, typer.Option(help="End between sweeps before this time, for example 11h.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of needles and resampling.")] = 0,
    rehearse: Annotated[
        int | None, typer.Option(help="Prepare all, gate this many layers, and end.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Only the JSON on stdout.")] = False,
) -> None:
    """Paired perplexity and needle-in-a-haystack of KV-cache codecs against the exact cache."""
    began = time.monotonic()
    from layersweep.tasks.settings import (
        EvalSettings,
        parse_counts,
        parse_depths,
        parse_segments,
        parse_tasks,
    )

    settings = EvalSettings(
        kv=kv,
        tasks=parse_tasks(tasks),
        text=text,
        segments=parse_segments(segments),
        prefix=prefix,
        continuation=continuation,
        bos=bos,  # type: ignore[arg-type]  # checked by EvalSettings
        cache_mode=cache_mode,  # type: ignore[arg-type]
        niah_contexts=parse_counts("--niah-context", niah_context),
        niah_depths=parse_depths(niah_depths),
        niah_per_depth=niah_per_depth,
        niah_keys=niah_keys,
        niah_mode=niah_mode,  # type: ignore[arg-type]
        gate=gate,  # type: ignore[arg-type]
        seed=seed,
    )
    machine = MachineOptions(
        revision, vram, ram, device, dtype, weights, router_dtype, assume_capability
    )  # fmt: skip
    job = Job(
        model, settings, machine, out, resume,
        None if stop_after is None else parse_duration(stop_after, option="--stop-after"),
        began, command_line(),
    )  # fmt: skip
    if rehearse is not None:
        from layersweep.cli.rehearse import rehearse_study

        rehearse_study(job, rehearse)
        return
    results = _compute(job, shard)
    if results is None:  # another process has the rest, and prints it
        return
    if json_output:
        sys.stdout.write(json.dumps(results, allow_nan=False) + "\n")
    else:
        from layersweep.report.table import print_report

        print_report(Console(), results)


def _compute(job: Job, shard: str | None) -> dict[str, Any] | None:
    """Here, as one of several processes, or with a process for each device."""
    from layersweep.cli.launch import launch
    from layersweep.cli.shards import compute_rank
    from layersweep.runs.shard import parse_shard, shard_of_rank

    def say(line: str) -> None:
        Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)

    own = parse_shard(shard) if shard is not None else None
    if own and job.out is None:
        raise InputError(
            f"--shard {shard}: found no --out, needed a folder for this part of the study",
            hint=f"--out results/{own.folder}, then `layersweep merge` with the folders of all",
        )
    if "," in job.machine.device and (own or job.settings.gate == "only"):
        raise InputError(
            f"--device {job.machine.device}: found several devices with "
            f"{'--shard' if own else '--gate only'}, needed one",
            hint=f"--device {job.machine.device.split(',')[0]}",
        )
    if own:
        return compute(job, own)
    if rank := shard_of_rank(os.environ):
        return compute_rank(job, rank, say)
    if "," in job.machine.device:
        return launch(job, say)
    return compute(job)
