"""The one place where a failure becomes an exit code and two lines on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from layersweep.errors import LayersweepError

Fail = Callable[[str, str, int], int]


def fail(message: str, hint: str, code: int) -> int:
    """One `error:` line and one `hint:` line on stderr."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    if hint:
        print("hint: " + " ".join(hint.split()), file=sys.stderr)
    return code


def exit_code(call: Callable[[], object], fail: Fail = fail) -> int:
    """Of a command: what it returns, else 0, or what its failure ends with, told by `fail`.

    0 done, 2 bad input, 3 the gate refused, 130 interrupted; 1 a failing machine. Anything else
    is our own mistake and keeps its traceback.
    """
    try:
        code = call()
        return code if isinstance(code, int) else 0
    except LayersweepError as failure:
        return fail(str(failure), failure.hint, failure.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", "", 130)
