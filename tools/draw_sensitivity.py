"""Draw docs/images/sensitivity.svg, what each stream of each layer costs alone, from lines of
`layersweep bench codec --model`, a panel for each.

python tools/draw_sensitivity.py docs/measurements/sensitivity.jsonl      needs matplotlib
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

TARGET = Path(__file__).parents[1] / "docs/images/sensitivity.svg"
STYLES = {"keys": ("o-", "C0"), "values": ("s--", "C1")}


def main(path: str, target: Path = TARGET) -> None:
    lines = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    matplotlib.rcParams.update({"svg.hashsalt": "layersweep", "font.size": 10})
    figure, panels = plt.subplots(
        1, len(lines), figsize=(5.5 * len(lines), 4.5), layout="constrained", squeeze=False
    )
    for axes, line in zip(panels[0], lines, strict=True):
        draw(axes, line["rows"][0])
        axes.set_title(f"{line['model']['source']}, {line['rows'][0]['job']}", fontsize=10)
    panels[0][0].set_ylabel("KL of predictions, thousandths of a nat per token")
    figure.savefig(target, metadata={"Date": None})


def draw(axes: Any, row: dict[str, Any]) -> None:
    """The loss by layer and stream of one arm, and of all layers together."""
    for stream, (style, color) in STYLES.items():
        points = [
            (one["layer"], 1000 * one[stream]["kl"]) for one in row["layers"] if stream in one
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, ms=4, label=stream)
            axes.axhline(1000 * row[stream]["kl"], color=color, lw=1, ls=":")
    axes.axhline(1000 * row["everything"]["kl"], color="0.4", lw=1, label="everything")
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer, coded alone (dotted: all layers)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main(*sys.argv[1:2])
