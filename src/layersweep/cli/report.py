"""`layersweep report` and `layersweep compare`: finished runs, printed again or against another."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

# scipy takes a second to import: the commands import what they need when they run
if TYPE_CHECKING:
    from rich.console import RenderableType

    from layersweep.runs.compare import Comparison


class ReportFormat(StrEnum):
    """csv: one line per window; csv-arms: one line per arm."""

    MD = "md"
    CSV = "csv"
    CSV_ARMS = "csv-arms"
    LATEX = "latex"
    HTML = "html"


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's folder, or its results.json.")
    ],
    report_format: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="Without it, the table that the run printed."),
    ] = None,
) -> None:
    """Print a finished run again; html writes report.html beside the results."""
    from rich.console import Console

    from layersweep.report.html import write_html
    from layersweep.report.store import load_results
    from layersweep.report.table import print_report

    results = load_results(directory)
    if report_format is None:
        print_report(Console(), results)
    elif report_format is ReportFormat.HTML:
        folder = directory if directory.is_dir() else directory.parent
        print(write_html(folder, results))
    else:
        sys.stdout.write(_as_text(results, report_format))


def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR1", help="The run to compare with.")],
    second: Annotated[Path, typer.Argument(metavar="DIR2", help="The run that is compared.")],
) -> None:
    """Pair two runs window by window (by token hash) and print second minus first."""
    from rich.console import Console, Group
    from rich.text import Text

    from layersweep.report.sections import caption_lines
    from layersweep.report.store import load_results
    from layersweep.report.table import print_whole
    from layersweep.runs.compare import compare_runs

    first_results = load_results(first)
    comparison = compare_runs(first_results, load_results(second))
    lines = [Text(line) for line in caption_lines(first_results)]
    print_whole(Console(), Group(*lines, *_comparison(comparison)))


def _as_text(results: dict[str, Any], report_format: ReportFormat) -> str:
    from layersweep.report import export

    writers = {
        ReportFormat.MD: export.markdown,
        ReportFormat.CSV: export.windows_csv,
        ReportFormat.CSV_ARMS: export.arms_csv,
        ReportFormat.LATEX: export.latex,
    }
    return writers[report_format](results)


def _comparison(comparison: Comparison) -> list[RenderableType]:
    """The table, how many windows were common, and the arms of one run alone."""
    from rich.table import Table
    from rich.text import Text

    from layersweep.report.compare import comparison_cells

    head, lines = comparison_cells(comparison)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for title in head:
        table.add_column(title, justify="left" if title == "arm" else "right")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    counts = f"{comparison.windows[0]} and {comparison.windows[1]}"
    words = f"{comparison.common} common windows of {counts}; differences in percent"
    parts: list[RenderableType] = [table, Text(words)]
    for name, arms in (("first", comparison.only_first), ("second", comparison.only_second)):
        if arms:
            parts.append(Text(f"only in the {name} run: {', '.join(arms)}"))
    return parts
