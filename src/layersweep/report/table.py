"""The terminal table: what a run prints when it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from layersweep.report import rows

Json = dict[str, Any]

FULL_WIDTH = 100  # narrower terminals get fewer columns rather than cut numbers
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


def print_report(console: Console, results: Json) -> None:
    """Prints the report; a `console` that is no terminal is made at least 100 columns wide."""
    if not console.is_terminal:
        console.width = max(FULL_WIDTH, console.width)
    console.print(report_table(results, width=console.width), highlight=False, markup=False)


def report_table(results: Json, *, width: int = FULL_WIDTH) -> RenderableType:
    """Header, caption, one row per arm, codec-to-codec lines, needles, verdict."""
    parts: list[RenderableType] = [Text(line) for line in rows.caption_lines(results)]
    if results["perplexity"] is not None:
        parts += _perplexity(results, width)
    if results["needle"] is not None:
        parts += _needle(results)
    parts += [Text(f"note: {line}", style="yellow") for line in rows.warnings(results)]
    parts.append(Text(rows.verdict(results), style="green" if results["publishable"] else "yellow"))
    return Group(*parts)


def _perplexity(results: Json, width: int) -> list[RenderableType]:
    columns = WIDE if width >= FULL_WIDTH else NARROW
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    for title, field in columns:
        if field == "label":
            table.add_column(title, overflow="fold", min_width=14)
        else:
            justify = "left" if field == "interval" else "right"
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows.perplexity_rows(results):
        cells = [Text(getattr(row, field)) for _, field in columns]
        table.add_row(*cells, style=None if row.ok else "red")
    lines: list[RenderableType] = [table]
    pairs = rows.pair_rows(results, every=False)
    lines += [Text(pair.line) for pair in pairs]
    if pairs:
        lines.append(Text(rows.PAIR_NOTE, style="dim"))
    lines.append(Text(rows.uncertainty_line(results), style="dim"))
    return lines


def _needle(results: Json) -> list[RenderableType]:
    failure = rows.needle_failure(results)
    style = "red" if failure else ""
    exact, *others = rows.needle_rows(results)
    lines = [Text(f"{rows.needle_title(results)}: exact {exact.count}", style=style)]
    lines += [Text(f"  {row.arm} {row.count}, {row.against}", style=style) for row in others]
    if len(results["needle"]["contexts"]) > 1:
        for arm in results["needle"]["arms"]:
            counts = ", ".join(f"{context}: {n}" for context, n in rows.context_counts(arm))
            lines.append(Text(f"  {arm['arm']} by context {counts}", style=style))
    if failure:
        lines.append(Text(failure, style="bold red"))
    return list(lines)
