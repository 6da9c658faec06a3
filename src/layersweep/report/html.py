"""report.html: one file, no request to anywhere, light and dark, that a person can show."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from layersweep.report import caption
from layersweep.report.facts import run_facts
from layersweep.report.section import Section
from layersweep.report.sections import shown, warnings
from layersweep.runs.files import write_atomically

Json = dict[str, Any]

REPORT_FILE = "report.html"


def write_html(directory: Path, results: Json) -> Path:
    """Writes DIRECTORY/report.html, whole or not at all."""
    path = directory / REPORT_FILE
    write_atomically(path, html_page(results))
    return path


def html_page(results: Json) -> str:
    """The whole page as text."""
    css = resources.files("layersweep.report").joinpath("page.css").read_text("utf-8")
    title = f"KV cache report: {caption.model_line(results).partition('  ')[0]}"
    sections = shown(results)
    body = [section.page(results, _asides(results, section)) for section in sections]
    body = [_head(results), *body, run_facts(results), _foot(results)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


def _asides(results: Json, section: Section) -> dict[str, list[str]]:
    """What the other sections say of each arm."""
    found: dict[str, list[str]] = {}
    for other in shown(results):
        for arm, words in other.asides(results).items() if other is not section else ():
            found.setdefault(arm, []).append(words)
    return found


def _head(results: Json) -> str:
    model, _, weights = caption.model_line(results).partition("  ")
    return (
        '<p class="kicker">layersweep report</p>'
        f'<h1>What a quantized KV cache costs<br><span class="whose">{escape(model)}</span></h1>'
        f'<p class="lead">{escape(weights[:1].upper() + weights[1:])}.</p>'
        f"{verdict(results)}{notes(results)}"
    )


def notes(results: Json) -> str:
    """What must be known before a number is used; empty where there is nothing."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in warnings(results))
    return f'<div class="notice"><strong>Note</strong><ul>{lines}</ul></div>' if lines else ""


def verdict(results: Json) -> str:
    """Whether the numbers may leave the house, and what is missing."""
    if results["publishable"]:
        line = caption.verdict(results)
        return f'<div class="notice good"><strong>Publishable</strong>{escape(line[11:])}</div>'
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in results["reasons"])
    return (
        f'<div class="notice bad"><strong>NOT PUBLISHABLE</strong> because<ul>{reasons}</ul></div>'
    )


def _foot(results: Json) -> str:
    return (
        f"<footer>layersweep {escape(str(results['versions']['layersweep']))}, "
        f"{escape(results['created'])}. Intervals are 95 %: BCa bootstrap for perplexity, "
        "percentile bootstrap for loss ratios, Wilson for needles. Every number on this page is in "
        "results.json.</footer>"
    )
