"""The options of `layersweep eval` that a kernel will be given, checked before anything is pushed.

A typo that Kaggle finds costs a session; found here it costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from layersweep.cli.eval import evaluate
from layersweep.cli.plan import plan
from layersweep.errors import InputError
from layersweep.units import parse_size

# Options of `eval` that `layersweep kaggle` has itself, and those that the kernel sets.
OWN = ("model", "kv", "device", "stop_after", "revision")
KERNELS = ("out", "resume", "shard", "json_output", "rehearse")
GPU_ALONE = ("vram", "ram", "dtype", "assume_capability")  # the rehearsal's machine is another
CHOICES = {
    "dtype": ("auto", "float16", "bfloat16", "float32"),
    "weights": ("auto", "native", "nf4"),
    "router_dtype": ("float32", "hidden"),
}
DEVICES = re.compile(r"cpu(,cpu)*|cuda|cuda:0|cuda:0,cuda:1")


@dataclass(frozen=True)
class StudyArguments:
    """Options by parameter name, as the kernel gets them; `files` travel with the wheels, and
    {files} in a value stands for their folder."""

    given: dict[str, str]
    files: dict[str, bytes]

    def words(self, without: Sequence[str] = ()) -> list[str]:
        """For `eval`."""
        return _words(evaluate, {k: v for k, v in self.given.items() if k not in without})

    def plan_words(self) -> list[str]:
        """For `plan`, which knows some of the options. It has no text to count all windows in."""
        known = {param.name for param in get_command(_app(plan)).params}
        kept = {k: v for k, v in self.given.items() if k in known - {"vram", "ram"}}
        if kept.get("segments") == "all":
            del kept["segments"]
        return _words(plan, kept)


def check_study(kv: str, device: str, words: Sequence[str]) -> StudyArguments:
    """Raises InputError or a usage error for whatever `layersweep eval` would refuse without a
    model, and for options that are not the study's."""
    params, given = _parse(words)
    for name in given:
        if name in OWN:
            raise InputError(
                f"{_option(evaluate, name)}: found it after --, needed it before",
                hint="layersweep kaggle has --model, --kv, --device, --stop-after, --revision",
            )
        if name in KERNELS:
            raise InputError(
                f"{_option(evaluate, name)}: found it, needed none: the kernel sets it",
                hint="leave it out",
            )
    _check_machine(device, params)
    _check_settings(kv, params)
    files: dict[str, bytes] = {}
    values = {"kv": _ship_codecs(kv, files)}
    values |= {name: str(params[name]) for name in given}
    if "text" in given:
        values["text"] = _ship(Path(params["text"]), files)
    return StudyArguments(values, files)


def _parse(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """All values of `eval`'s parameters, and the names of those that were given."""
    context = get_command(_app(evaluate)).make_context("layersweep eval", list(words))
    given = []
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given.append(name)
    return context.params, given


def _check_machine(device: str, params: dict[str, Any]) -> None:
    if not DEVICES.fullmatch(device):
        raise InputError(
            f"--device: found '{device}', needed cuda:0,cuda:1, cuda:0 or cpu: a session with T4s "
            "has two",
            hint="--device cuda:0,cuda:1",
        )
    for name in ("vram", "ram"):
        if params[name] != "auto":
            parse_size(params[name], option=f"--{name}")
    for name, allowed in CHOICES.items():
        if params[name] not in allowed:
            raise InputError(
                f"{_option(evaluate, name)}: found '{params[name]}', needed one of "
                f"{', '.join(allowed)}",
                hint=f"{_option(evaluate, name)} {allowed[0]}",
            )
    if device.startswith("cpu") and params["dtype"] not in ("auto", "float32"):
        raise InputError(
            f"--dtype {params['dtype']}: found device cpu, which computes in float32 alone",
            hint="--dtype float32 (or auto)",
        )
    if params["gate"] == "only" and "," in device:
        raise InputError(
            f"--gate only: found --device {device}, needed one device", hint="--device cuda:0"
        )


def _check_settings(kv: str, params: dict[str, Any]) -> None:
    """As `eval` checks them, including the user's text and codecs."""
    from layersweep.kv.arms import parse_arms
    from layersweep.tasks.settings import EvalSettings, parse_counts, parse_depths, parse_segments
    from layersweep.text.source import load_text

    plain = ("bos", "cache_mode", "niah_per_depth", "niah_keys", "niah_mode", "gate", "seed")
    settings = EvalSettings(
        kv=kv,
        tasks=tuple(part.strip() for part in params["tasks"].split(",") if part.strip()),
        text=params["text"],
        segments=parse_segments(params["segments"]),
        prefix=params["prefix"],
        continuation=params["continuation"],
        niah_contexts=parse_counts("--niah-context", params["niah_context"]),
        niah_depths=parse_depths(params["niah_depths"]),
        **{name: params[name] for name in plain},
    )
    if settings.gate == "off":
        raise InputError(
            "--gate off: found it for a kernel, needed the gate, which ends a run whose numbers "
            "would be worthless",
            hint="leave --gate out",
        )
    if not parse_arms(kv) and settings.gate != "only":
        raise InputError(
            f"--kv: found '{kv}', needed an arm besides the exact baseline", hint="--kv K3V2,K4V2"
        )
    if settings.text is not None:
        load_text(settings.text, "")
        if not Path(settings.text).is_file():  # a pipe, which is read once
            raise InputError(
                f"--text {settings.text}: found no regular file, needed one to send along",
                hint="write the text to a file first",
            )


def _ship_codecs(kv: str, files: dict[str, bytes]) -> str:
    """--kv with the files of the user's codecs replaced by their places on Kaggle."""
    arms = []
    for arm in kv.split(","):
        path, in_file, rest = arm.partition(".py:")
        arms.append(f"{_ship(Path(path.strip() + '.py'), files)}:{rest}" if in_file else arm)
    return ",".join(arms)


def _ship(path: Path, files: dict[str, bytes]) -> str:
    data = path.read_bytes()
    if files.setdefault(path.name, data) != data or path.name.endswith((".whl", "metadata.json")):
        raise InputError(
            f"{path}: found another file with that name in the wheels folder, needed a unique one",
            hint="rename it",
        )
    return f"{{files}}/{path.name}"


def _app(function: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    return app


def _option(function: Callable[..., None], name: str) -> str:
    options = {param.name: param.opts[0] for param in get_command(_app(function)).params}
    return str(options[name])


def _words(function: Callable[..., None], given: dict[str, str]) -> list[str]:
    return [word for name, value in given.items() for word in (_option(function, name), value)]
