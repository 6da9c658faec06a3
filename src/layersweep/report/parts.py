"""The few HTML pieces that the report is made of. Whatever comes from data is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def figure(lines: Sequence[str], title: str, body: str, reading: str = "") -> str:
    """A figure or table under the caption's `lines`, with a sentence on how to read it."""
    caption = "<br>".join(escape(line) for line in lines)
    note = how(reading) if reading else ""
    return (
        f'<figure><figcaption><p class="caption">{caption}</p>'
        f'<div class="what">{escape(title)}</div>{note}</figcaption>{body}</figure>'
    )


def how(words: str) -> str:
    return f'<p class="how">{escape(words)}</p>'


def scroll(body: str) -> str:
    """Wide content scrolls inside its own box: the page itself never does sideways."""
    return f'<div class="scroll">{body}</div>'


def table(head: Sequence[str], body: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """Numbers right-aligned with tabular figures; `words`: text columns, left-aligned."""
    style = ' class="words"' if words else ""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in body
    )
    return f"<table{style}><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, two columns."""
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in pairs
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>'
