"""How one task's part of results.json is shown. A task is a file that makes a `Section`, and a line
in sections.py; the table, the page, the exports and the notebook's cell ask no further."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType

Json = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A figure by itself: SVG, or None where there is nothing to draw."""

    title: str
    draw: Callable[[Json], str | None]


@dataclass(frozen=True)
class Export:
    """A table for papers. `numbers`: right-aligned columns. `before` and `after`: paragraphs of
    Markdown around it; `caption`: sentences of LaTeX's caption."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    numbers: bool
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    caption: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """Each function takes the whole results, which hold what `name` names.

    protocol   the line under which its figures were measured
    warnings   what must be known before a number is believed
    terminal   what a terminal of some columns shows
    page       HTML for the page; takes what other sections say of each arm
    cell       HTML for a notebook's output
    export     Markdown and LaTeX
    asides     a few words per arm for other sections
    drawings   figures by the name that `Results.figure` takes
    """

    name: str
    protocol: Callable[[Json], str]
    warnings: Callable[[Json], list[str]]
    terminal: Callable[[Json, int], list[RenderableType]]
    page: Callable[[Json, Mapping[str, Sequence[str]]], str]
    cell: Callable[[Json], list[str]]
    export: Callable[[Json], Export]
    asides: Callable[[Json], Mapping[str, str]] = lambda results: {}
    drawings: Mapping[str, Drawing] = field(default_factory=dict)
