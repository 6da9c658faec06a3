"""The command as it was typed, for results.json."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    return "layersweep " + " ".join(shlex.quote(word) for word in sys.argv[1:])
