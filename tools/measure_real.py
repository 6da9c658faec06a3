r"""Measure KV arms on a real language model and print their table.

    python tools/make_smollm2.py models && python tools/make_prose.py prose.txt
    python tools/measure_real.py models/smollm2-nf4 prose.txt --out runs \
        --append docs/measurements/real.jsonl
    python tools/measure_real.py --table docs/measurements/real.jsonl

Two runs of `layersweep eval`: 80 windows of 1024 + 512 tokens whose prefix is quantized after an
exact prefill, and 20 in which every token reads a quantized past. Prints a JSON line for each arm,
with the command behind it, and appends it to a file; whole results go to folders under --out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A bare name is the default of its cache mode. K16 and V16 keep one stream exact.
PREFILL = (
    "K3V2,trellis:K3V2,trellis:K3V2@sink=4,K2V2,trellis:K2V2,K4V2,trellis:K4V2,K3V3,K4V4,K3V16,K16V2,"
    "K3V2@pb=2,K3V2@window=64,e8:K3V2,e8:K3V2@sink=4,e8:K2V2,e8:K4V2,lloyd:K3V2@sink=4,"
    "turbo:K3V2@sink=4,kivi:K2V2,kivi:K2V2@sink=4,int4,q4_0,fp8,q8_0"
)
STREAMING = (
    "K3V2,K2V2,K4V2,trellis:K3V2,trellis:K3V2@window=64@sink=4,e8:K3V2,e8:K3V2@window=64@sink=4,"
    "int4,fp8"
)
SHOWN = ("bits_per_element", "ppl", "delta_percent", "ci95", "sem", "sem_iid", "n")
SHOWN += ("kl_mean", "kl_p50", "kl_p999", "top1_agreement", "status", "codec_version")
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint's folder")
    parser.add_argument("text", nargs="?", help="a UTF-8 text, articles under = Title = lines")
    parser.add_argument("--out", type=Path, help="an empty folder for results.json of both runs")
    parser.add_argument("--append", type=Path, help="a file that gets the lines, too")
    parser.add_argument("--windows", default="80")
    parser.add_argument("--streaming-windows", default="20")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what was measured before")
    given = parser.parse_args()
    if given.table:
        print(table([json.loads(line) for line in given.table.read_text("utf-8").splitlines()]))
        return
    if not (given.model and given.text and given.out):
        parser.error("MODEL, TEXT and --out are needed to measure")
    for mode, arms, windows in (
        ("prefill", PREFILL, given.windows),
        ("streaming", STREAMING, given.streaming_windows),
    ):
        options = ["--segments", windows, "--cache-mode", mode, "--device", given.device]
        results = evaluate(given.model, given.text, arms, [*options, "--out", given.out / mode])
        for line in lines(results):
            print(json.dumps(line), flush=True)
            if given.append:
                with given.append.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def evaluate(model: str, text: str, arms: str, options: list[Any]) -> Json:
    """What one `layersweep eval` found."""
    command = ["eval", model, "--text", text, "--tasks", "ppl", "--kv", arms, *map(str, options)]
    print("layersweep", *command, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "layersweep", *command], stdout=sys.stderr, check=True)
    found: Json = json.loads((options[-1] / "results.json").read_text("utf-8"))
    return found


def lines(results: Json) -> Iterator[Json]:
    """A line for each arm, the exact one first: it carries the protocol too."""
    section, protocol = results["perplexity"], results["protocol"]
    run = {
        "real": protocol["cache_mode"],
        "model": Path(results["model"]["source"]).name,
        "fingerprint": results["model"]["fingerprint"],
        "text_sha256": protocol["text_sha256"],
        **{name: protocol[name] for name in ("segments", "prefix", "continuation", "dtype")},
        "device": results["device"]["name"],
        "versions": results["versions"],
        "command": results["command"],
    }
    yield {"arm": "exact", "ppl": section["baseline"]["ppl"], **run}
    for arm in section["arms"]:
        yield {"arm": arm["arm"], **{name: arm[name] for name in SHOWN}, **run}


def table(found: list[Json]) -> str:
    """Markdown, a table for each mode."""
    parts = []
    for mode in dict.fromkeys(line["real"] for line in found):
        exact, *arms = [line for line in found if line["real"] == mode]
        head = "{model}, {segments} windows, {prefix} + {continuation}, {real}, {dtype}, {device}"
        rows = [
            "| arm | bits | delta % [95 % CI] | SEM | KL mean / p99.9 | top-1 |",
            "|---" * 6 + "|",
        ]
        rows += [_row(arm) for arm in arms]
        parts.append("\n".join([f"{head.format(**exact)}, ppl {exact['ppl']:.3f}", "", *rows]))
    return "\n\n".join(parts)


def _row(arm: Json) -> str:
    if arm["status"] != "ok":
        return f"| `{arm['arm']}` | {arm['bits_per_element']:.2f} | {arm['status']} | | | |"
    low, high = (100 * math.expm1(bound) for bound in arm["ci95"] or (math.nan, math.nan))
    return (
        f"| `{arm['arm']}` | {arm['bits_per_element']:.2f} "
        f"| {arm['delta_percent']:+.2f} [{low:+.2f}, {high:+.2f}] | {100 * (arm['sem'] or 0):.2f} "
        f"| {arm['kl_mean']:.4f} / {arm['kl_p999']:.2f} | {100 * arm['top1_agreement']:.1f} |"
    )


if __name__ == "__main__":
    main()
