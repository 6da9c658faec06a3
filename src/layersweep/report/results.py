"""What `layersweep.evaluate` returns: the object of results.json, shown as the report's table."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from layersweep.report.cell import figure_cell, results_cell
from layersweep.report.files import write_report
from layersweep.report.sections import caption_lines
from layersweep.report.store import load_results
from layersweep.report.table import print_report
from layersweep.report.width import FULL_WIDTH


class Results(dict[str, Any]):
    """A dict, equal to the object in results.json (`layersweep.results/2`).

    As the last expression of a notebook's cell it is the report's table; printed, the terminal's.
    """

    @classmethod
    def read(cls, location: str | os.PathLike[str]) -> Results:
        """The results in a run's folder, or in its results.json. Raises InputError."""
        return cls(load_results(Path(location)))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write results.json, report.html and windows.csv there, as `layersweep eval --out` does.

        Files of these names are replaced, each whole or not at all. Raises OSError where they
        cannot be written.
        """
        write_report(Path(folder), self)
        return Path(folder)

    def figure(self, name: str = "arms") -> Figure:
        """A figure of the report: "arms", "bits", "windows" or "needles".

        Raises InputError for another name, and for what was not measured.
        """
        return Figure(name, "; ".join(caption_lines(self)), figure_cell(self, name))

    def __repr__(self) -> str:
        stream = io.StringIO()
        # a notebook would otherwise have rich display what it is to write into the string, and its
        # kernel's FORCE_COLOR makes rich believe in a terminal, where long names are folded
        console = Console(
            file=stream, width=FULL_WIDTH, force_jupyter=False, force_terminal=False,
            color_system=None,
        )  # fmt: skip
        print_report(console, self)
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def _repr_html_(self) -> str:
        return results_cell(self)


@dataclass(frozen=True)
class Figure:
    """One drawing with its caption, for a notebook's cell. `html`: no request to anywhere."""

    name: str
    caption: str
    html: str

    def __repr__(self) -> str:
        return f"<figure {self.name}: {self.caption}>"

    def _repr_html_(self) -> str:
        return self.html
