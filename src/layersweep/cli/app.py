"""`layersweep`: the commands, and the one place where a failure becomes an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import typer

from layersweep.cli.doctor import doctor
from layersweep.cli.eval import evaluate
from layersweep.cli.inspect import inspect
from layersweep.cli.plan import plan
from layersweep.cli.report import compare, report
from layersweep.errors import LayersweepError

app = typer.Typer(
    name="layersweep",
    help="Evaluate language models whose weights do not fit the GPU, visiting every layer once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("eval")(evaluate)
app.command("inspect")(inspect)
app.command("plan")(plan)
app.command("doctor")(doctor)
app.command("report")(report)
app.command("compare")(compare)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process: 0 done, 2 bad input, 3 the gate refused,
    130 interrupted, 1 anything that is our own mistake (with its traceback)."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        code = app(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except LayersweepError as failure:
        return fail(str(failure), failure.hint, failure.exit_code)
    except click.ClickException as failure:
        return fail(_usage(failure), _usage_hint(failure), 2)
    except (KeyboardInterrupt, click.Abort):
        return fail("interrupted", "", 130)


def fail(message: str, hint: str, code: int) -> int:
    """One `error:` line and one `hint:` line on stderr."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    if hint:
        print("hint: " + " ".join(hint.split()), file=sys.stderr)
    return code


def _usage(failure: click.ClickException) -> str:
    return failure.format_message()


def _usage_hint(failure: click.ClickException) -> str:
    context = getattr(failure, "ctx", None)
    command = context.command_path if context else "layersweep"
    return f"see `{command} --help`"
