"""The needle section of the page and of a notebook's cell."""

from __future__ import annotations

from html import escape
from typing import Any

from layersweep.report.caption import model_line
from layersweep.report.needle import figures, rows
from layersweep.report.parts import figure, how, scroll, section, table

Json = dict[str, Any]

SHOWN_FAILURES = 40


def page(results: Json) -> str:
    """What was found, by depth, and what was answered where an arm was wrong."""
    title = rows.title(results)
    parts = [
        how(
            "A sentence with a number is hidden in the text and asked for at the end. The exact "
            "cache shows what the model can do at all; lost and gained count needles on which an "
            f"arm differs from it.{_stretches(results)}"
        ),
        notice(results),
        figure(
            _lines(results),
            title[:1].upper() + title[1:],
            scroll(needle_table(results)),
        ),
        figure(
            _lines(results),
            "Needles found by depth",
            scroll(figures.heatmap(results)),
            "Depth runs from the start of the context to its end. A cell holds few trials: read "
            "the totals with their 95 % intervals, use the cells to see where misses gather.",
        ),
        _failures(results),
    ]
    return section("Needle in a haystack", "".join(parts))


def needle_table(results: Json) -> str:
    """One row per arm: needles found, and against the exact cache."""
    body = [
        [row.arm, row.count, row.against.replace("+-", "\u00b1 ")]
        for row in rows.needle_rows(results)
    ]
    return table(["arm", "found", "against exact"], body, words=True)


def notice(results: Json) -> str:
    """The baseline's failure, which makes the arms' needles say nothing; empty where it passed."""
    failure = rows.failure(results)
    return f'<div class="notice bad"><strong>{escape(failure)}</strong></div>' if failure else ""


def _failures(results: Json) -> str:
    """What was answered where any arm was wrong; model output is escaped, it can be anything."""
    trials = [t for t in results["needle"]["trials"] if not all(t["correct"].values())]
    if not trials:
        return "<p class='how'>No arm missed a needle.</p>"
    lines = [
        [
            f"{trial['context']} at {100 * trial['achieved_depth']:.1f} %",
            trial["key"],
            trial["answer"],
            arm,
            trial["outputs"].get(arm, ""),
        ]
        for trial in trials[:SHOWN_FAILURES]
        for arm, right in trial["correct"].items()
        if not right
    ]
    shown = min(len(trials), SHOWN_FAILURES)
    grid = scroll(table(["needle", "key", "hidden", "arm", "answered"], lines, words=True))
    return (
        f"<details><summary>Failed needles ({shown} of {len(trials)} shown)</summary>"
        f"{grid}</details>"
    )


def _lines(results: Json) -> list[str]:
    return [model_line(results), rows.protocol_line(results)]


def _stretches(results: Json) -> str:
    """What p and the error of answers are taken over."""
    groups = results["needle"]["groups"]
    if groups is None:
        return ""
    return (
        " Haystacks overlap, so p and the error of the answers' NLL are taken over "
        f"{groups['count']} stretches of the text."
    )
