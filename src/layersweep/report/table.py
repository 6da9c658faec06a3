"""The terminal table: what a run prints when it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.text import Text

from layersweep.report import caption
from layersweep.report.sections import caption_lines, shown, warnings
from layersweep.report.width import FULL_WIDTH

Json = dict[str, Any]


def print_report(console: Console, results: Json) -> None:
    """Prints the report. Where `console` is no terminal, as wide as its content: a file has no
    right edge at which a long arm's name would have to be cut or folded."""
    if not console.is_terminal:
        console.width = max(FULL_WIDTH, console.width)
        table = report_table(results, width=console.width)
        console.width = max(console.width, content_width(console, table))
    else:
        table = report_table(results, width=console.width)
    console.print(table, highlight=False, markup=False)


def content_width(console: Console, table: RenderableType) -> int:
    """Columns that the widest line needs."""
    endless = console.options.update(max_width=10_000)
    return Measurement.get(console, endless, table).maximum


def report_table(results: Json, *, width: int = FULL_WIDTH) -> RenderableType:
    """Caption, every section, notes, verdict."""
    parts: list[RenderableType] = [Text(line) for line in caption_lines(results)]
    for section in shown(results):
        parts += section.terminal(results, width)
    parts += [Text(f"note: {line}", style="yellow") for line in warnings(results)]
    style = "green" if results["publishable"] else "yellow"
    parts.append(Text(caption.verdict(results), style=style))
    return Group(*parts)
