"""What is wrong with a checkpoint, one sentence per fact, collected before anything is raised."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.errors import CheckpointError

DOWNLOAD_AGAIN = "the file is damaged or incomplete: download it again"
TWICE = ("the same key twice", "every key once")  # found and needed
LONGEST_PART = 400  # of a sentence, in characters: a name in a file may have megabytes

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


@dataclass(frozen=True)
class Problem:
    """One fact about one file (and tensor, where there is one): what was found, what was needed."""

    file: str
    tensor: str | None
    found: str
    needed: str
    hint: str

    def sentence(self) -> str:
        """ "model.safetensors: lm_head.weight: found ..., needed ..." in printable characters."""
        where = self.file if self.tensor is None else f"{self.file}: {_cut(self.tensor)}"
        return printable(f"{where}: found {_cut(self.found)}, needed {_cut(self.needed)}")


class FileProblem(CheckpointError):
    """One file that cannot be used; a scan of the folder keeps `problem` and continues."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.sentence(), hint=problem.hint)
        self.problem = problem


def problems_error(problems: Sequence[Problem]) -> CheckpointError:
    """The first problem in full, and how many more there are."""
    first, more = problems[0], len(problems) - 1
    if not more:
        return FileProblem(first)
    others = "1 more problem" if more == 1 else f"{more} more problems"
    return CheckpointError(
        f"{first.sentence()} (and {others})",
        hint=f"{first.hint}; `layersweep inspect` lists every problem",
    )


def show(value: object) -> str:
    """`value` as Python spells it, cut where it is long."""
    return _SHORT.repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_PART else text[:LONGEST_PART] + "..."


def printable(text: str) -> str:
    """`text` with control characters escaped: names come from files that anyone may have made."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
