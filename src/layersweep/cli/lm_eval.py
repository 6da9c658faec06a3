"""`layersweep lm-eval`: lm-evaluation-harness, all requests and all arms in one sweep."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from layersweep.cli.command import command_line
from layersweep.errors import Fallback, InputError

if TYPE_CHECKING:
    from layersweep.sweep.model import Model


def lm_eval(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or demo.")],
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags of lm-eval, or patterns.")],
    kv: Annotated[str, typer.Option(help="Arms besides `exact`; none: the exact cache.")] = "",
    limit: Annotated[
        float | None, typer.Option(help="Documents of each task; below 1, a share of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the context; else the task's own.", min=0)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with the YAML files of more tasks.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Contexts as a chat.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the longest text; else the model's limit.")
    ] = None,
    vram: Annotated[str, typer.Option(help="Device budget, for example 14GiB.")] = "auto",
    ram: Annotated[str, typer.Option(help="Host budget.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    router_dtype: Annotated[str, typer.Option(help="float32 or hidden.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; none: no files.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Only the JSON on stdout.")] = False,
) -> None:
    """Run lm-evaluation-harness under the exact cache and every arm of --kv, in one sweep."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "lm-eval: found no package lm_eval, needed lm-evaluation-harness",
            hint="pip install 'layersweep[lm-eval]'",
        )
    if limit is not None and limit <= 0:
        raise InputError(f"--limit: found {limit:g}, needed more than 0", hint="--limit 100")
    if kv.strip():  # the cheapest refusal first: no torch yet
        from layersweep.kv.arms import parse_arms

        parse_arms(kv)
    from layersweep.integrations.lm_eval.evaluate import FILE, Asked, evaluate, load_tasks
    from layersweep.integrations.lm_eval.harness import Harness
    from layersweep.integrations.lm_eval.scoring import EXACT_CACHE, harness_arms
    from layersweep.integrations.lm_eval.table import print_table
    from layersweep.progress import SweepProgress
    from layersweep.sweep.model import load

    if out is not None and (out / FILE).exists():
        raise InputError(
            f"--out {out}: found the results of another run, needed a folder of its own",
            hint="name another folder",
        )
    asked = Asked(
        tuple(name.strip() for name in tasks.split(",") if name.strip()),
        num_fewshot, limit, include_path, apply_chat_template,
    )  # fmt: skip
    opened = load(
        model, revision=revision, vram=vram, ram=ram, device=device, dtype=dtype, weights=weights,
        router_dtype=router_dtype,
    )  # fmt: skip
    _announce(opened)
    harness = Harness.of(opened, [EXACT_CACHE, *harness_arms(kv)], max_length, _say)
    loaded = load_tasks(asked, model)
    with SweepProgress(Console(stderr=True)) as harness.progress:
        results = evaluate(harness, loaded, asked, command=command_line(), out=out)
    if json_output:
        sys.stdout.write(json.dumps(results, allow_nan=False) + "\n")
    else:
        print_table(Console(), results)
    if out is not None:
        _line(f"wrote {out}/{FILE}, and lm-eval's results of each arm beside it")


def _announce(model: Model) -> None:
    """Of the lines that every run prints first, those that need no plan."""
    from layersweep.cli.events import layout_line, versions_line

    _line(layout_line(model.checkpoint))
    for note in model.checkpoint.notes:
        _line(f"note: {note}")
    _, paths, budget = str(model).splitlines()
    _line(f"[paths] {paths}")
    _line(f"[budget] {budget}")
    _line(versions_line())
    for fallback in model.compute.fallbacks:
        _say(fallback)


def _line(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def _say(fallback: Fallback) -> None:
    _line(f"fallback: {fallback}")
