"""`layersweep kaggle`: a study as kernels that `kaggle kernels push` takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from layersweep.errors import InputError
from layersweep.units import format_bytes, parse_duration

if TYPE_CHECKING:
    from layersweep.kaggle.folders import Push, Written

QUOTA = (
    "If Kaggle answers 500 to `run` but accepts `rehearse`, this week's GPU quota is used up: see "
    "`kaggle quota`. If it answers 500 to both, a field of kernel-metadata.json is wrong."
)


def kaggle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    ident: Annotated[str, typer.Option("--id", help="USER/SLUG, the start of all ids.")],
    study: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- EVAL OPTIONS]", help="Options of `layersweep eval`."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="demo, hub id, dataset:OWNER/SLUG or kaggle-model:O/M/F/V/VERSION."),
    ] = "demo",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    kv: Annotated[str, typer.Option(help="Arms besides `exact`.")] = "K3V2,K4V2",
    device: Annotated[str, typer.Option(help="cuda:0,cuda:1, cuda:0 or cpu.")] = "cuda:0,cuda:1",
    stop_after: Annotated[str, typer.Option(help="End the session before this time.")] = "11h",
    offline: Annotated[
        bool, typer.Option("--offline", help="No internet for rehearse and run.")
    ] = False,
    resume_from: Annotated[
        str | None, typer.Option(help="Kernel OWNER/SLUG, or dataset:OWNER/SLUG, to resume from.")
    ] = None,
    wheel: Annotated[
        list[Path] | None, typer.Option(help="A wheel for the wheelhouse; may be repeated.")
    ] = None,
) -> None:
    """Write kernels that stage a model, rehearse a study without GPU, and run it."""
    from layersweep.cli.kaggle_study import GPU_ALONE, check_study
    from layersweep.kaggle.folders import Push, write_folders
    from layersweep.kaggle.metadata import Id
    from layersweep.kaggle.sources import parse_earlier, parse_model, staged

    own = Id.parse(ident)
    source = parse_model(model)
    if revision is not None and source.kind != "hub":
        raise InputError(
            f"--revision: found '{revision}' for {source}, needed a hub id",
            hint="leave --revision out",
        )
    parse_duration(stop_after, option="--stop-after")
    arguments = check_study(kv, device, study or [])
    if offline and source.kind != "demo" and "text" not in arguments.given:
        raise InputError(
            "--offline: found no --text, needed one: without internet no text can be downloaded",
            hint=f"layersweep kaggle {folder} ... -- --text FILE",
        )
    again = f"layersweep kaggle {folder} ... --resume-from {own.of('run')}, then push `run` again"
    push = Push(
        ident=own,
        model=source,
        staged=staged(source.reference, revision) if source.kind == "hub" else None,
        study=[*arguments.words(), "--device", device, "--stop-after", stop_after],
        rehearsal=[*arguments.words(without=GPU_ALONE), "--device", "cpu", "--rehearse", "2"],
        plan=[*arguments.plan_words(), "--for", "t4x2"],
        gpus=0 if device.startswith("cpu") else 1 + device.count(","),
        offline=offline,
        files=arguments.files,
        wheels=[*(wheel or [])],
        earlier=parse_earlier(resume_from) if resume_from else None,
        again=again,
    )
    written = write_folders(folder, push)
    for line in _next_steps(folder, push, written):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _next_steps(folder: Path, push: Push, written: Written) -> list[str]:
    """The commands that follow, in order."""
    ident = push.ident
    jobs = push.staged.jobs if push.staged else ()
    sizes = [
        f"{name} {sum(job.values()) / 1e9:.1f} GB"
        for name, job in zip(written.stages, jobs, strict=True)
    ]
    wheels = [f"{path.name} {format_bytes(path.stat().st_size)}" for path in written.wheels]
    lines = [
        f"{folder}: {', '.join([*sizes, 'rehearse', 'run'])}; wheels: {', '.join(wheels)}",
        "next:",
        f"  kaggle datasets create -p {folder}/wheels        once; `kaggle datasets version` later",
    ]
    lines += [f"  kaggle kernels push -p {folder}/{name}" for name in written.stages]
    lines += [
        f"  kaggle kernels status {ident.of(name)}        until complete" for name in written.stages
    ]
    lines += [
        f"  kaggle kernels push -p {folder}/rehearse        no GPU quota; wait for its last line",
        f"  kaggle kernels push -p {folder}/run",
        f"  kaggle kernels output {ident.of('run')} -p results",
        f"to resume a partial run: {push.again}",
        QUOTA,
    ]
    return lines
