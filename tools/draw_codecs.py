"""Draw docs/images/codecs.svg, error against stored bits, from a line of `layersweep bench codec`.

python tools/draw_codecs.py docs/measurements/codec-cpu.jsonl      needs matplotlib
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

TARGET = Path(__file__).parents[1] / "docs/images/codecs.svg"
LABELS = {"e8": "e8 (published, true bits)", "trellis@states=1024": "trellis, 2^10 states"}


def main(path: str) -> None:
    rows = json.loads(Path(path).read_text("utf-8"))["rows"]
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        name, _, options = row["job"].partition("@")
        method = name.split(":")[0] + ("@" + options if options else "")
        if (row["bits_per_element"] or 16) < 5.2:
            found[method].append((row["bits_per_element"], row["mse"]))
    matplotlib.rcParams.update({"svg.hashsalt": "layersweep", "font.size": 10})
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    bits = [2 + i / 20 for i in range(66)]
    axes.plot(bits, [4**-b for b in bits], color="0.6", label="Shannon's bound, 4^-bits")
    for number, (method, points) in enumerate(found.items()):
        style = "o-" if "trellis" in method else ("s--" if len(points) > 1 else "D")
        width = 2.2 if method == "trellis" else 1.2
        label = LABELS.get(method, method)
        axes.plot(
            *zip(*points, strict=True), style, lw=width, ms=5, color=f"C{number % 10}", label=label
        )
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per element, scales and means included")
    axes.set_ylabel("mean squared error of unit Gaussian vectors of 128")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
