"""`layersweep generate`: texts go on, one or many, each through the caches that are asked for."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from layersweep.cli.job import MachineOptions
from layersweep.cli.steps import SamplingOptions, prepare, scheduled
from layersweep.errors import InputError

if TYPE_CHECKING:
    from layersweep.generate.prompts import Prompt
    from layersweep.generate.scheduler import Scheduler
    from layersweep.kv.arms import Arm


def generate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or demo.")] = "demo",
    prompt: Annotated[str | None, typer.Option(help="A text to go on with.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Many: a JSON object per line, with prompt, messages or ids."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for answers, a JSON object each.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file in --out.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="--prompt is a user's message in the chat template.")
    ] = False,
    kv: Annotated[str, typer.Option(help="The caches: exact, or arms, each answers.")] = "exact",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; the model's own, or 20.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="The model's own by default; 0: the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep tokens of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep those above this share.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="End tokens end nothing.")
    ] = False,
    logprobs: Annotated[int | None, typer.Option(help="Likeliest tokens to report.")] = None,
    bos: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    max_running: Annotated[int, typer.Option(help="Texts at once, at most.", min=1)] = 256,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a text; the model's limit by default.")
    ] = None,
    vram: Annotated[str, typer.Option(help="Device budget, for example 14GiB.")] = "auto",
    ram: Annotated[str, typer.Option(help="Host budget.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    router_dtype: Annotated[str, typer.Option(help="float32 or hidden.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
) -> None:
    """Go on with a text, or with all texts of a file. One answer goes to stdout as it comes, many
    go to --out (or stdout), a JSON object as each finishes."""
    from layersweep.kv.arms import EXACT, parse_arms

    arms = [EXACT] if "exact" in [name.strip().lower() for name in kv.split(",")] else []
    arms += parse_arms(kv, growing=True)
    _check_asked(prompt, prompts, out, resume, chat, bos)
    options = SamplingOptions(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed,
        tuple(stop) if stop else None, ignore_eos or None, logprobs,
    )  # fmt: skip
    machine = MachineOptions(revision, vram, ram, device, dtype, weights, router_dtype, None)
    console = Console(stderr=True)

    from layersweep.generate.prompts import one_prompt, read_prompts
    from layersweep.sweep.shapes import length_limit

    ready = prepare(model, machine, options)
    if prompts is not None:
        asked = read_prompts(prompts, ready.tokenizer, ready.sampling, bos)
    else:
        assert prompt is not None
        asked = [one_prompt(prompt, ready.tokenizer, ready.sampling, bos=bos, chat=chat)]
    most = min(max_running, len(asked) * len(arms))
    limit, _ = length_limit(ready.model.decoder)
    longest = max_length or min(limit, max(one.longest for one in asked))
    with (
        _answers_file(out, resume) as (file, done),
        scheduled(ready, arms, console, most=most, longest=longest) as scheduler,
    ):
        streams = prompt is not None and out is None and len(arms) == 1
        if streams and logprobs is None:  # text alone; a JSON object has the log-probabilities
            _stream(scheduler, asked[0], arms[0], console)
        else:
            _write(scheduler, asked, arms, file, done, console)


def _check_asked(
    prompt: str | None, prompts: Path | None, out: Path | None, resume: bool, chat: bool, bos: str
) -> None:
    if (prompt is None) == (prompts is None):
        found = "none" if prompt is None else "both"
        raise InputError(
            f"--prompt, --prompts: found {found}, needed one of them",
            hint='--prompt "Once upon a time", or --prompts FILE with a JSON object per line',
        )
    if resume and out is None:
        raise InputError("--resume: found no --out, needed the file to go on with")
    if chat and bos != "auto":
        raise InputError(
            f"--bos {bos}: found --chat, needed a plain prompt: a chat template has its own",
            hint="leave --bos out",
        )
    if chat and prompts is not None:
        raise InputError(
            "--chat: found --prompts, needed --prompt",
            hint='lines of a file say themselves what they are: {"messages": [...]}',
        )


@contextmanager
def _answers_file(out: Path | None, resume: bool) -> Iterator[tuple[TextIO, frozenset[str]]]:
    """Where answers go, and those that are there."""
    from layersweep.generate.prompts import kept_answers

    if out is None:
        yield sys.stdout, frozenset()
        return
    done: frozenset[str] = frozenset()
    if out.exists():
        if not resume:
            raise InputError(
                f"--out {out}: found a file, needed a new one", hint="--resume goes on with it"
            )
        done, whole = kept_answers(out)
        os.truncate(out, whole)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        yield file, done


def _stream(scheduler: Scheduler, prompt: Prompt, arm: Arm, console: Console) -> None:
    """One answer, as it comes."""
    (request,) = prompt.requests([arm])
    scheduler.check(request)
    scheduler.submit(request)
    began, first, count = time.monotonic(), 0.0, 0
    while not scheduler.idle:
        for output in scheduler.step():
            first = first or time.monotonic()
            count += output.token is not None
            sys.stdout.write(output.text)
            sys.stdout.flush()
            if output.error:
                raise InputError(f"{arm.name}: the answer ended with {output.error}")
    sys.stdout.write("\n")
    rate = (count - 1) / (time.monotonic() - first) if count > 1 else 0.0
    console.print(
        f"{len(prompt.ids)} tokens read in {first - began:.1f} s, {count} made, {rate:.1f}/s",
        highlight=False,
    )


def _write(
    scheduler: Scheduler, prompts: list[Prompt], arms: list[Arm], file: TextIO,
    done: frozenset[str], console: Console,
) -> None:  # fmt: skip
    """Every answer, as it finishes."""
    from layersweep.generate.prompts import answers
    from layersweep.progress import SweepProgress

    total, count = len(prompts) * len(arms), 0
    began, broken = time.monotonic(), 0
    with SweepProgress(console) as progress:
        for answer in answers(scheduler, prompts, arms, done):
            file.write(json.dumps(answer.line(), ensure_ascii=False) + "\n")
            file.flush()
            count += 1
            broken += answer.error is not None
            progress("answers", count, total)
    spent, counts = time.monotonic() - began, scheduler.counts
    already = f", {total - count} were there" if count < total else ""
    wrong = f", {broken} ended with an error" if broken else ""
    console.print(
        f"{count} answers{wrong}{already}: {counts.tokens} tokens in {counts.walks} walks, "
        f"{counts.tokens / max(spent, 1e-9):.1f} a second",
        highlight=False,
    )
