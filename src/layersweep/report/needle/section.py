"""Needles in every report: terminal, page, notebook, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from layersweep.report.needle import figures, html, rows
from layersweep.report.parts import scroll
from layersweep.report.section import Drawing, Export, Section

Json = dict[str, Any]


def terminal(results: Json, width: int) -> list[RenderableType]:
    """A line per arm, and one more where there are several contexts."""
    failure = rows.failure(results)
    style = "red" if failure else ""
    exact, *others = rows.needle_rows(results)
    lines = [Text(f"{rows.title(results)}: exact {exact.count}", style=style)]
    lines += [Text(f"  {row.arm} {row.count}, {row.against}", style=style) for row in others]
    if len(results["needle"]["contexts"]) > 1:
        for arm in results["needle"]["arms"]:
            counts = ", ".join(f"{context}: {n}" for context, n in rows.context_counts(arm))
            lines.append(Text(f"  {arm['arm']} by context {counts}", style=style))
    if failure:
        lines.append(Text(failure, style="bold red"))
    return list(lines)


def cell(results: Json) -> list[str]:
    """The terminal's lines as an HTML table."""
    title = rows.title(results)
    return [
        f"<h3>{escape(title[:1].upper() + title[1:])}</h3>",
        html.notice(results),
        scroll(html.needle_table(results)),
    ]


def export(results: Json) -> Export:
    """A row per arm."""
    failure = rows.failure(results)
    return Export(
        head=["arm", "found", "against exact"],
        body=[[row.arm, row.count, row.against] for row in rows.needle_rows(results)],
        numbers=False,
        before=[f"{rows.title(results)}:"],
        after=[f"**{failure}**"] if failure else [],
        caption=[rows.title(results), *([failure] if failure else [])],
    )


def asides(results: Json) -> Mapping[str, str]:
    return {row.arm: f"needles {row.count}" for row in rows.needle_rows(results)}


NEEDLE = Section(
    name="needle",
    protocol=rows.protocol_line,
    warnings=lambda results: [],
    terminal=terminal,
    page=lambda results, asides: html.page(results),
    cell=cell,
    export=export,
    asides=asides,
    drawings={"needles": Drawing("Needles found by depth", figures.heatmap)},
)
