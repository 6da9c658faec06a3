"""The report in a notebook's output: the page's tables and figures, in the notebook's own colours.

A notebook knows its theme, not its reader's system setting, so text and rules take the colour of
what is around them, and marks take colours that stand on white and on black.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from layersweep.errors import InputError
from layersweep.report import figures, html, rows
from layersweep.report.parts import scroll

Json = dict[str, Any]

CLASS = "layersweep-report"


def results_cell(results: Json) -> str:
    """The terminal's report as HTML: caption, arms, pairs, needles, notes, verdict."""
    body = [_caption(results)]
    if results["perplexity"] is not None:
        body += [
            scroll(html.arm_table(results)),
            scroll(html.pair_table(results, every=False)),
            html.uncertainty(results),
        ]
    if results["needle"] is not None:
        title = rows.needle_title(results)
        body += [
            f"<h3>{escape(title[:1].upper() + title[1:])}</h3>",
            html.needle_notice(results),
            scroll(html.needle_table(results)),
        ]
    return _cell([*body, html.verdict(results), html.notes(results)])


def figure_cell(results: Json, name: str) -> str:
    """One figure of the page under its caption. Raises InputError for what was not measured."""
    if name not in FIGURES:
        raise InputError(
            f"figure: found '{name}', needed one of {', '.join(FIGURES)}",
            hint=f'results.figure("{next(iter(FIGURES))}")',
        )
    section, title, draw = FIGURES[name]
    drawn = draw(results) if results[section] is not None else None
    if not drawn:
        raise InputError(
            f"figure: found no {section} in these results, needed it for '{name}'",
            hint='evaluate with tasks=["ppl", "niah"]',
        )
    head = _caption(results, needle=section == "needle")
    return _cell([head, f"<h3>{escape(title)}</h3>", scroll(drawn)])


def _windows(results: Json) -> str:
    pictures = (
        (arm["arm"], figures.windows(results, arm)) for arm in results["perplexity"]["arms"]
    )
    return "".join(f"<h3>{escape(name)}</h3>{picture}" for name, picture in pictures if picture)


FIGURES: dict[str, tuple[str, str, Callable[[Json], str | None]]] = {
    "arms": ("perplexity", "Difference to the exact cache", figures.forest),
    "bits": ("perplexity", "Loss against measured bits", figures.loss_against_bits),
    "windows": ("perplexity", "Difference per window, 100 x nats (about percent)", _windows),
    "needles": ("needle", "Needles found by depth", figures.heatmap),
}


def _caption(results: Json, *, needle: bool = False) -> str:
    lines = "<br>".join(escape(line) for line in rows.caption_lines(results, needle=needle))
    return f'<p class="caption">{lines}</p>'


def _cell(parts: list[str]) -> str:
    return f'<style>{_style()}</style><div class="{CLASS}">{"".join(parts)}</div>'


@cache
def _style() -> str:
    """page.css and cell.css, nested: nothing of them reaches the rest of the notebook."""
    here = resources.files("layersweep.report")
    page = here.joinpath("page.css").read_text("utf-8")
    page = page.replace(":root {", "& {").replace("\nbody {", "\n& {")
    return f".{CLASS} {{ {page} {here.joinpath('cell.css').read_text('utf-8')} }}"
