"""The terminal table: what a run prints when it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from layersweep.report import caption
from layersweep.report.sections import caption_lines, shown, warnings
from layersweep.report.width import FULL_WIDTH

Json = dict[str, Any]


def print_report(console: Console, results: Json) -> None:
    """Prints the report, with all of its columns where `console` is no terminal."""
    width = console.width if console.is_terminal else max(FULL_WIDTH, console.width)
    print_whole(console, report_table(results, width=width))


def print_whole(console: Console, content: Group) -> None:
    """Prints `content`; where `console` is no terminal, as wide as its widest table. A file has no
    right edge at which a long name would have to be folded."""
    if not console.is_terminal:
        endless = console.options.update(max_width=10_000)
        tables = [part for part in content.renderables if isinstance(part, Table)]
        widths = [Measurement.get(console, endless, table).maximum for table in tables]
        console.width = max([FULL_WIDTH, *widths])
    console.print(content, highlight=False, markup=False)


def report_table(results: Json, *, width: int = FULL_WIDTH) -> Group:
    """Caption, every section, notes, verdict."""
    parts: list[RenderableType] = [Text(line) for line in caption_lines(results)]
    sections = shown(results)
    for section in sections:
        parts += section.terminal(results, width)
    if not sections and (gate := caption.gate_line(results)):
        parts.append(Text(gate))
    parts += [Text(f"note: {line}", style="yellow") for line in warnings(results)]
    style = "green" if results["publishable"] else "yellow"
    parts.append(Text(caption.verdict(results), style=style))
    return Group(*parts)
