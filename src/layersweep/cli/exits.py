"""The one place where a failure becomes an exit code and two lines on stderr."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

import typer

from layersweep.errors import Interrupted, LayersweepError
from layersweep.runs.files import remedy

Fail = Callable[[str, str, int], int]
# errors of writes alone, and of no file of ours: these are told by `runs.files.writing`
_OF_STDOUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)


def print_any_name() -> None:
    """What stdout's encoding lacks is printed escaped: a file's name must not cost a run its table.

    Names come as bytes of any encoding, and stdout may be ASCII.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
        sys.stdout.flush()  # here, where a failure is still told
    except LayersweepError as failure:
        return fail(str(failure), failure.hint, failure.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = Interrupted.exit_code
    except OSError as failure:
        return _failed_file(failure, fail)
    if code == Interrupted.exit_code:  # typer's own, too, for Ctrl-C
        return fail("interrupted", "", Interrupted.exit_code)
    return code if isinstance(code, int) else 0


def _failed_file(failure: OSError, fail: Fail) -> int:
    """Tell of a file, or of stdout, that failed; quietly if that is a pipe that nobody reads."""
    if failure.filename is not None:
        return fail(f"{failure.filename}: {failure.strerror}", remedy(failure), 1)
    if failure.errno not in _OF_STDOUT:
        raise failure
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    if failure.errno == errno.EPIPE:
        return 1
    return fail(f"stdout: cannot be written ({failure.strerror})", remedy(failure), 1)
