"""Every section of a report, in the order in which it is shown."""

from __future__ import annotations

from typing import Any

from layersweep.report import caption
from layersweep.report.needle.section import NEEDLE
from layersweep.report.perplexity.section import PERPLEXITY
from layersweep.report.section import Section

Json = dict[str, Any]

SECTIONS = (PERPLEXITY, NEEDLE)


def shown(results: Json) -> list[Section]:
    """The sections of what was measured."""
    return [section for section in SECTIONS if results[section.name] is not None]


def caption_lines(results: Json, section: Section | None = None) -> list[str]:
    """Whose weights, and the protocol of `section`: of the first one, where none is named."""
    protocols = [one.protocol(results) for one in ([section] if section else shown(results)[:1])]
    return [caption.model_line(results), *protocols]


def warnings(results: Json) -> list[str]:
    """What a reader must know before believing the numbers, besides the publishing line."""
    toy = [caption.TOY_WARNING] if results["model"]["source"] == "demo" else []
    return toy + [line for section in shown(results) for line in section.warnings(results)]
