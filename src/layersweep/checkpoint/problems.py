"""What is wrong with a checkpoint, one sentence per fact, collected before anything is raised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.errors import CheckpointError

DOWNLOAD_AGAIN = "the file is damaged or incomplete: download it again"


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
        where = self.file if self.tensor is None else f"{self.file}: {self.tensor}"
        return printable(f"{where}: found {self.found}, needed {self.needed}")


class FileProblem(CheckpointError):
    """One file that cannot be used; whoever scans a folder keeps `problem` and goes on."""

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


def printable(text: str) -> str:
    """`text` with control characters escaped: names come from files that anyone may have made."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
