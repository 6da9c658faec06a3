r"""One table of reference methods in both cache modes, from runs of `layersweep eval`.

    layersweep eval MODEL --text TEXT --tasks ppl --kv ... --out runs/a
    layersweep eval MODEL --text TEXT --tasks ppl --kv ... --cache-mode streaming --out runs/b
    python tools/measure_reference.py runs/a runs/b > docs/measurements/reference.jsonl
    python tools/measure_reference.py --table docs/measurements/reference.jsonl

The first call prints a JSON line for each arm of each run, the second Markdown: an arm's figures of
both modes in one row, bits as measured and by arithmetic at 4K and 32K tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from measure_real import SHOWN, Json

RUN = ("segments", "prefix", "continuation", "dtype", "text_sha256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders with a results.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what was measured before")
    given = parser.parse_args()
    if given.table:
        print(table([json.loads(line) for line in given.table.read_text("utf-8").splitlines()]))
    for folder in given.runs:
        for line in lines(json.loads((folder / "results.json").read_text("utf-8"))):
            print(json.dumps(line))


def lines(results: Json) -> Iterator[Json]:
    """A line for each arm, in the order of the run."""
    section, protocol = results["perplexity"], results["protocol"]
    exact = section["baseline"]["kv_bytes"]
    for arm in section["arms"]:
        yield {
            "arm": arm["arm"],
            **{name: arm[name] for name in SHOWN},
            "simulated": arm["simulated"],
            "bits_at": {
                tokens: 16 * arm["kv_bytes"][tokens] / exact[tokens] for tokens in ("4096", "32768")
            },
            "mode": protocol["cache_mode"],
            "model": Path(results["model"]["source"]).name,
            **{name: protocol[name] for name in RUN},
            "device": results["device"]["name"],
            "versions": results["versions"],
            "command": results["command"],
        }


def table(found: list[Json]) -> str:
    """Markdown: arms in the order in which they were first measured."""
    by_mode = {
        mode: {line["arm"]: line for line in found if line["mode"] == mode}
        for mode in ("prefill", "streaming")
    }
    heads = ["arm", "bits", "delta %", "SEM", "KL mean / p99.9", "streaming delta %"]
    heads += ["streaming KL mean / p99.9", "bits at 4K", "at 32K"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in dict.fromkeys(line["arm"] for line in found):
        prefill, streaming = (of_mode.get(arm) for of_mode in by_mode.values())
        line = prefill or streaming
        assert line is not None
        cells = [f"`{arm}`", f"{line['bits_per_element']:.2f}", *_loss(prefill, sem=True)]
        cells += [
            *_loss(streaming, sem=False),
            *(f"{bits:.2f}" for bits in line["bits_at"].values()),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _loss(line: Json | None, sem: bool) -> list[str]:
    """Cells of the loss and the KL; empty where the arm was not measured."""
    if line is None:
        return [""] * (2 + sem)
    spread = [f"{100 * line['sem']:.2f}"] if sem else []
    kl = f"{line['kl_mean']:.4f} / {line['kl_p999']:.2f}"
    return [f"{line['delta_percent']:+.2f}", *spread, kl]


if __name__ == "__main__":
    main()
