"""`layersweep`: the commands, and one file for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import typer
from typer.main import get_command

from layersweep.cli.bench import bench
from layersweep.cli.chat import chat
from layersweep.cli.codec import codec
from layersweep.cli.doctor import doctor
from layersweep.cli.eval import evaluate
from layersweep.cli.exits import exit_code, fail, print_any_name
from layersweep.cli.generate import generate
from layersweep.cli.inspect import inspect
from layersweep.cli.kaggle import kaggle
from layersweep.cli.lm_eval import lm_eval
from layersweep.cli.merge import merge
from layersweep.cli.plan import plan
from layersweep.cli.quantize import quantize
from layersweep.cli.report import compare, report
from layersweep.cli.sensitivity import calibrate
from layersweep.cli.serve import serve
from layersweep.cli.synth import synth
from layersweep.notebook import in_notebook_shell

NOTEBOOK_COLUMNS = "100"

# typer carries a click of its own and exports this one of its exceptions: its base is "usage"
UsageError: type[typer.BadParameter] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="layersweep",
    help="Evaluate language models whose weights do not fit the GPU, visiting every layer once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("eval")(evaluate)
app.command("chat")(chat)
app.command("generate")(generate)
app.command("serve")(serve)
app.command("inspect")(inspect)
app.command("plan")(plan)
app.command("doctor")(doctor)
app.command("merge")(merge)
app.command("report")(report)
app.command("compare")(compare)
app.command("synth")(synth)
app.command("quantize")(quantize)
app.command("calibrate")(calibrate)
app.command("kaggle")(kaggle)
app.command("lm-eval")(lm_eval)
app.add_typer(bench)
app.add_typer(codec)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process: 0 done, 2 bad input, 3 the gate refused,
    130 interrupted, 1 anything that is our own mistake (with its traceback)."""
    if in_notebook_shell():  # its terminal says 80 columns, its output scrolls sideways
        os.environ.setdefault("COLUMNS", NOTEBOOK_COLUMNS)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line."""
    print_any_name()
    try:
        return exit_code(lambda: _command()(args=arguments, standalone_mode=False))
    except UsageError as failure:
        return fail(_usage(failure, arguments or sys.argv[1:]), _usage_hint(failure), 2)


@cache
def _command() -> Callable[..., Any]:
    """Built once: typer would build every command anew at each call, in 20 ms."""
    return get_command(app)


def _usage(failure: typer.BadParameter, words: Sequence[str]) -> str:
    """typer's message, with the value that was found where it leaves that out."""
    message = failure.format_message()
    for option in getattr(getattr(failure, "param", None), "opts", ()):
        if option in words[:-1]:
            return f"{option}: found '{words[list(words).index(option) + 1]}': {message}"
    return message


def _usage_hint(failure: Exception) -> str:
    context = getattr(failure, "ctx", None)
    return f"see `{context.command_path if context else 'layersweep'} --help`"
