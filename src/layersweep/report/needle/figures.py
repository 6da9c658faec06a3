"""Needles found by depth, as one SVG."""

from __future__ import annotations

from typing import Any

from layersweep.report import svg, text
from layersweep.report.needle import rows

Json = dict[str, Any]


def heatmap(results: Json) -> str:
    """Needles found by depth (columns), arm and context (rows); k/n in cells, totals at the right.

    A cell's interval is its tooltip; the row's total prints its own.
    """
    section = results["needle"]
    lines = [(arm, context) for arm in section["arms"] for context in section["contexts"]]
    depths = sorted({cell["depth"] for arm in section["arms"] for cell in arm["by_depth"]})
    single = len(section["contexts"]) == 1
    names = [svg.clip(arm["arm"] if single else f"{arm['arm']} at {c}") for arm, c in lines]
    left, right, top, height = svg.name_width([*names, "depth"]), 620, 30, 28
    step = (right - left) / max(len(depths), 1)
    marks = [
        svg.text(left + step * (i + 0.5), 20, f"{100 * depth:.0f} %", "tick", anchor="middle")
        for i, depth in enumerate(depths)
    ]
    marks.append(svg.text(left - 14, 20, "depth", "tick", anchor="end"))
    for row, (arm, context) in enumerate(lines):
        y = top + height * row
        marks.append(svg.text(left - 14, y + 18, names[row], "name", anchor="end"))
        cells = {c["depth"]: c for c in arm["by_depth"] if c["context"] == context}
        for column, depth in enumerate(depths):
            if depth in cells:
                marks.append(_cell(left + step * column, y, step, height, cells[depth]))
        total = dict(rows.context_counts(arm))[context]
        marks.append(svg.text(right + 14, y + 18, total, "number"))
    return svg.drawing(svg.WIDTH, top + height * len(lines) + 8, "Needles by depth", marks)


def _cell(x: float, y: float, width: float, height: float, cell: Json) -> str:
    share = cell["correct"] / cell["n"]
    count = text.count_of(cell["correct"], cell["n"], cell["wilson95"])
    tip = f"{100 * cell['depth']:.0f} %: {count}"
    style, opacity = ("found", 0.16) if share == 1 else ("lost", 0.12 + 0.6 * (1 - share))
    box = svg.rect(x + 1, y + 1, width - 2, height - 2, style, opacity=opacity)
    words = svg.text(
        x + width / 2, y + 18, f"{cell['correct']}/{cell['n']}", "cell", anchor="middle"
    )
    return f"<g><title>{tip}</title>{box}{words}</g>"
