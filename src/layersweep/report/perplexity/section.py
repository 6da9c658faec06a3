"""Perplexity in every report: terminal, page, notebook, Markdown and LaTeX."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from layersweep.report.parts import scroll
from layersweep.report.perplexity import figures, html, rows
from layersweep.report.section import Drawing, Export, Section
from layersweep.report.width import FULL_WIDTH

Json = dict[str, Any]

WIDE = (
    ("arm", "label"),
    ("bits", "bits"),
    ("size", "size"),
    ("ppl", "ppl"),
    ("delta %", "delta"),
    ("[95 % CI]", "interval"),
    ("SEM", "sem"),
    ("z", "z"),
    ("worse", "worse"),
    ("KL mean/p99.9", "kl"),
    ("top-1", "top1"),
)
NARROW = tuple(column for column in WIDE if column[1] not in ("size", "z", "kl", "top1"))
OTHER_WORDS = {"[95 % CI]": "95 % CI", "top-1": "top-1 %"}  # where there is room


def terminal(results: Json, width: int) -> list[RenderableType]:
    """One row per arm, codec-to-codec lines, where uncertainty comes from."""
    columns = WIDE if width >= FULL_WIDTH else NARROW
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for title, field in columns:
        if field == "label":
            table.add_column(title, overflow="fold", min_width=14)
        else:
            justify = "left" if field == "interval" else "right"
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows.arm_rows(results):
        cells = [Text(getattr(row, field)) for _, field in columns]
        table.add_row(*cells, style=None if row.ok else "red")
    lines: list[RenderableType] = [table]
    if sizes := rows.sizes_line(results):
        lines.append(Text(sizes))
    pairs = rows.pair_rows(results, every=False)
    lines += [Text(pair.line) for pair in pairs]
    if pairs:
        lines.append(Text(rows.PAIR_NOTE, style="dim"))
    lines.append(Text(rows.uncertainty_line(results), style="dim"))
    return lines


def cell(results: Json) -> list[str]:
    """The terminal's tables as HTML."""
    tables = [html.arm_table(results), html.pair_table(results, every=False)]
    return [*map(scroll, tables), html.uncertainty(results)]


def export(results: Json) -> Export:
    """The terminal's table with its pairs."""
    pairs = [
        f"- {p.a} - {p.b}: {p.delta} % {p.interval}, {p.p}, z {p.z}, loss ratio {p.ratio}"
        for p in rows.pair_rows(results, every=False)
    ]
    uncertainty, sizes = rows.uncertainty_line(results), rows.sizes_line(results)
    return Export(
        head=[OTHER_WORDS.get(title, title) for title, _ in WIDE],
        body=[[getattr(row, field) for _, field in WIDE] for row in rows.arm_rows(results)],
        numbers=True,
        after=[
            f"{uncertainty}. Not comparable with other protocols.",
            *([f"{sizes[:1].upper()}{sizes[1:]}."] if sizes else []),
            *pairs,
            *([f"{rows.PAIR_NOTE}."] if pairs else []),
        ],
        caption=[uncertainty, *([sizes] if sizes else [])],
    )


def _windows(results: Json) -> str:
    pictures = (
        (arm["arm"], figures.windows(results, arm)) for arm in results["perplexity"]["arms"]
    )
    return "".join(f"<h3>{escape(name)}</h3>{picture}" for name, picture in pictures if picture)


PERPLEXITY = Section(
    name="perplexity",
    protocol=rows.protocol_line,
    warnings=rows.warnings,
    terminal=terminal,
    page=html.page,
    cell=cell,
    export=export,
    drawings={
        "arms": Drawing("Difference to the exact cache", figures.forest),
        "bits": Drawing("Loss against measured bits", figures.loss_against_bits),
        "windows": Drawing("Difference per window, 100 x nats (about percent)", _windows),
    },
)
