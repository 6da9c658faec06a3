"""The report in a notebook's output: the page's tables and figures, in the notebook's own colours.

A notebook knows its theme, not its reader's system setting, so text and rules take the colour of
what is around them, and marks take colours that stand on white and on black.
"""

from __future__ import annotations

from functools import cache
from html import escape
from importlib import resources
from typing import Any

from layersweep.errors import InputError
from layersweep.report import html
from layersweep.report.parts import scroll
from layersweep.report.sections import SECTIONS, caption_lines, shown

Json = dict[str, Any]

CLASS = "layersweep-report"


def results_cell(results: Json) -> str:
    """The terminal's report as HTML: caption, every section, notes, verdict."""
    body = [part for section in shown(results) for part in section.cell(results)]
    caption = _caption(caption_lines(results))
    return _cell([caption, *body, html.verdict(results), html.notes(results)])


def figure_cell(results: Json, name: str) -> str:
    """One figure of the page under its caption. Raises InputError for what was not measured."""
    section = SECTION_OF.get(name)
    if section is None:
        raise InputError(
            f"figure: found '{name}', needed one of {', '.join(SECTION_OF)}",
            hint=f'results.figure("{next(iter(SECTION_OF))}")',
        )
    drawing = section.drawings[name]
    drawn = drawing.draw(results) if results[section.name] is not None else None
    if not drawn:
        raise InputError(
            f"figure: found no {section.name} in these results, needed it for '{name}'",
            hint='evaluate with tasks=["ppl", "niah"]',
        )
    head = _caption(caption_lines(results, section))
    return _cell([head, f"<h3>{escape(drawing.title)}</h3>", scroll(drawn)])


SECTION_OF = {name: section for section in SECTIONS for name in section.drawings}
"""The section of each figure."""


def _caption(lines: list[str]) -> str:
    return f'<p class="caption">{"<br>".join(escape(line) for line in lines)}</p>'


def _cell(parts: list[str]) -> str:
    return f'<style>{_style()}</style><div class="{CLASS}">{"".join(parts)}</div>'


@cache
def _style() -> str:
    """page.css and cell.css, nested: nothing of them reaches the rest of the notebook."""
    here = resources.files("layersweep.report")
    page = here.joinpath("page.css").read_text("utf-8")
    page = page.replace(":root {", "& {").replace("\nbody {", "\n& {")
    return f".{CLASS} {{ {page} {here.joinpath('cell.css').read_text('utf-8')} }}"
