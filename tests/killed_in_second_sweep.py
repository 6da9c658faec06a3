"""`layersweep`, ended by SIGKILL in the middle of its second sweep; under torchrun rank 0, once."""

import os
import signal
import sys
from typing import Any

import tiny_study

from layersweep.cli.app import run
from layersweep.study import run as running

MORTAL = os.environ.get("RANK", "0") == os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

real, sweeps = running.run_sweep, 0


def die(phase: str, done: int, total: int) -> None:
    if done == tiny_study.MIDDLE:
        os.kill(os.getpid(), signal.SIGKILL)


def sweep(*args: Any, **named: Any) -> Any:
    global sweeps
    sweeps += 1
    return real(*args, **named | ({"progress": die} if MORTAL and sweeps == 2 else {}))


if __name__ == "__main__":
    running.run_sweep = sweep
    sys.exit(run(sys.argv[1:]))
