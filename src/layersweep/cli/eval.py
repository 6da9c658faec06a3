"""`layersweep eval`: what does a quantized KV cache cost this model?"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from layersweep.errors import GateError, LayersweepError

if TYPE_CHECKING:  # torch and scipy load only once the arguments are known to be good
    from layersweep.cli.events import Events
    from layersweep.cli.output import RunFolder
    from layersweep.evals.settings import EvalSettings
    from layersweep.evals.study import Study

DEFAULT_DEPTHS = "0.05,0.15,0.25,0.35,0.45,0.55,0.65,0.75,0.85,0.95"


@dataclass(frozen=True)
class Machine:
    """Where and how to compute; field names are the command's options."""

    revision: str | None
    vram: str
    ram: str
    device: str
    dtype: str
    weights: str
    router_dtype: str
    assume_capability: str | None


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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    router_dtype: Annotated[str, typer.Option(help="float32 or hidden.")] = "float32",
    assume_capability: Annotated[
        str | None, typer.Option(help="Take the paths of an older GPU, for example 7.5.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; none: no files.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of needles and resampling.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Only the JSON on stdout.")] = False,
) -> None:
    """Paired perplexity and needle-in-a-haystack of KV-cache codecs against the exact cache."""
    from layersweep.evals.settings import (
        EvalSettings,
        parse_counts,
        parse_depths,
        parse_segments,
    )

    settings = EvalSettings(
        kv=kv,
        tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()),
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
    machine = Machine(
        revision, vram, ram, device, dtype, weights, router_dtype, assume_capability
    )  # fmt: skip
    results = _run(model, settings, machine, out, resume)
    if json_output:
        sys.stdout.write(json.dumps(results, allow_nan=False) + "\n")
    else:
        from layersweep.report.table import print_report

        print_report(Console(), results)


def _run(
    source: str, settings: EvalSettings, machine: Machine, out: Path | None, resume: bool
) -> dict[str, Any]:
    """Prepare, run and write; any failure leaves diagnosis.json in `out`."""
    from layersweep.cli.events import Events
    from layersweep.cli.output import RunFolder

    events = Events(Console(stderr=True))
    study = None
    with RunFolder(out, resume=resume) as folder:
        try:
            study = _prepare(source, settings, machine, folder, events)
            return _measure(study, folder, events)
        except (Exception, KeyboardInterrupt) as failure:
            if out is not None and folder.usable:
                _diagnose(out, failure, study, events)
            raise


def _diagnose(out: Path, failure: BaseException, study: Study | None, events: Events) -> None:
    """Write diagnosis.json and hint at it; the failure itself counts more than that."""
    try:
        path = events.write_diagnosis(out, failure, study)
    except OSError as second:
        events.say(f"note: {out}/diagnosis.json cannot be written ({second.strerror})")
        return
    if isinstance(failure, LayersweepError):
        failure.hint = f"{failure.hint}; details in {path}" if failure.hint else str(path)
    else:
        events.say(f"hint: details in {path}")


def _prepare(
    source: str, settings: EvalSettings, machine: Machine, folder: RunFolder, events: Events
) -> Study:
    from layersweep.cli.events import budget_line, layout_line, paths_line, versions_line
    from layersweep.evals.study import prepare_study
    from layersweep.kv.arms import parse_arms

    parse_arms(settings.kv)  # the cheapest refusal first: no torch yet
    from layersweep.sweep.model import load

    loaded = load(source, **asdict(machine))
    events.say(layout_line(loaded.checkpoint))
    for note in loaded.checkpoint.notes:
        events.say(f"note: {note}")
    study = prepare_study(loaded, settings, kept=folder.path is not None)
    folder.start(study, events.say)
    events.say(paths_line(study))
    events.say(budget_line(study))
    events.say(versions_line())
    for fallback in study.fallbacks:
        events.say_fallback(fallback)
    return study


def _measure(study: Study, folder: RunFolder, events: Events) -> dict[str, Any]:
    from layersweep.evals.results import build_results
    from layersweep.evals.run import Outcome, StudyRun
    from layersweep.progress import SweepProgress

    command = "layersweep " + " ".join(shlex.quote(word) for word in sys.argv[1:])
    with StudyRun(study, events.say_fallback) as running:
        try:
            with SweepProgress(events.console) as progress:
                outcome = running.measure(
                    progress=progress, finished_sweep=lambda sweep: folder.keep(study, sweep)
                )
        except GateError:
            folder.finish(build_results(study, Outcome(), status="gate_failed", command=command))
            raise
        results = build_results(study, outcome, status="complete", command=command)
        folder.finish(results)
    if folder.path is not None:
        events.say(f"wrote {folder.path}/results.json, report.html, windows.csv")
    return results
