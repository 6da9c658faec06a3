"""Two runs against each other, as a table."""

from __future__ import annotations

from layersweep.report import text
from layersweep.runs.compare import Comparison


def comparison_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and formatted lines of the table, percent of perplexity."""
    head = ["arm", "second - first %", "[95 % CI]", "SEM", "worse", "equal", "largest", "Holm p"]
    decimals = text.decimals_for([entry.paired.sem for entry in comparison.arms])
    lines = []
    for entry in comparison.arms:
        paired = entry.paired
        lines.append(
            [
                entry.arm,
                text.signed(paired.delta_percent, decimals),
                text.interval_percent(paired.ci95, decimals),
                text.fixed(None if paired.sem is None else 100 * paired.sem, decimals + 1),
                f"{paired.n_worse}/{paired.n}",
                f"{entry.equal}/{paired.n}",
                f"{100 * entry.largest:.2g}",
                text.p_value(entry.p_holm),
            ]
        )
    return head, lines
