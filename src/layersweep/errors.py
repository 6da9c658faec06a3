"""Every failure that layersweep raises on purpose. The exit code is part of the class.

A message says what was found and what was needed; the hint says what to do about it.
"""

from __future__ import annotations

from typing import NamedTuple


class Fallback(NamedTuple):
    """Something done in a simpler way than wanted: printed when it happens, and recorded."""

    what: str
    wanted: str
    used: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: wanted {self.wanted}, used {self.used}: {self.why}"


class LayersweepWarning(UserWarning):
    """A note on a checkpoint, or a fallback, for callers from Python outside a notebook."""


class LayersweepError(Exception):
    """Base class. `exit_code` is what the command line ends with."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback, as on the command line: the message says
        which argument, file or layer it is about, and not every IPython shows notes."""
        lines = [f"{type(self).__name__}: {self}"]
        return [*lines, f"hint: {self.hint}"] if self.hint else lines


class InputError(LayersweepError, ValueError):
    """The user's argument, file or environment cannot be used as it is (exit 2)."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint that cannot be read: names file, tensor, what was found and needed."""


class BudgetError(InputError):
    """The request does not fit the memory budget: names needed, available and what fits."""


class NoRoomTogether(BudgetError):
    """Several devices cannot hold the weights together, each its share of the layers."""


class MachineError(LayersweepError):
    """The machine failed while the run was under way: disk full, memory gone, a file that vanished
    (exit 1). What was finished is kept."""


class Interrupted(LayersweepError):
    """Ctrl-C in a run (exit 130). What was finished is kept where there is a folder for it."""

    exit_code = 130


class GateError(LayersweepError):
    """The gate refused the run (exit 3): a model that does not work must not be measured."""

    exit_code = 3
