r"""Measure KV arms on a real language model and print one table of them.

    python tools/make_smollm2.py models && python tools/make_prose.py prose.txt
    python tools/measure_real.py models/smollm2-nf4 prose.txt --out runs \
        --append docs/measurements/real.jsonl
    python tools/measure_real.py --table docs/measurements/real.jsonl

Three runs of `layersweep eval`: windows of 1024 + 512 tokens whose prefix is quantized after an
exact prefill, the same windows while every token reads a quantized past, and needles. Then
`bench codec` times each arm. Prints a JSON line for each arm and run, with the command behind it,
and appends it to a file; whole results go to folders under --out. In the table, an arm's figures of
all runs share a row.
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

# A bare name is the default of its cache mode: what it does beyond the spelled-out name comes next
# to it. Published methods come as their programs ship them, some with exact first tokens, too.
ARMS = (
    "K3V2,K3V2@fit=0,trellis:K3V2@sink=4,trellis:K3V2,e8:K3V2,e8:K3V2@sink=4,"
    "K2V2,K2V2@fit=0,trellis:K2V2@sink=4,trellis:K2V2,e8:K2V2,e8:K2V2@sink=4,"
    "K4V2,K4V2@fit=0,trellis:K4V2@sink=4,trellis:K4V2,e8:K4V2,e8:K4V2@sink=4,"
    "lloyd:K3V2@sink=4,turbo:K3V2@sink=4,"
    "turboquant:K8V4,turboquant:K4V4,turboquant:K3V4,turboquant:K3V3,turboquant:K3V4@sink=4,"
    "kvarn:K4V2@sink=128,kvarn:K2V2@sink=128,oscar:K2V2@window=256@sink=64,oscar:K2V2@sink=4,"
    "kivi:K2V2,kivi:K2V2@residual=128,kivi:K4V4@residual=128,"
    "int4,q4_0,q4_0@rotate=1,q5_0@rotate=1,q8_0@rotate=1,fp8,q8_0"
)
MODES = ("prefill", "streaming", "needle", "rates")
SHOWN = ("bits_per_element", "simulated", "status", "codec_version")
PERPLEXITY = ("ppl", "delta_percent", "ci95", "sem", "sem_iid", "n")
PERPLEXITY += ("kl_mean", "kl_p50", "kl_p999", "top1_agreement")
RATES = ("encode_vectors_per_s", "decode_vectors_per_s")
Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint's folder")
    parser.add_argument("text", nargs="?", help="a UTF-8 text, articles under = Title = lines")
    parser.add_argument("--out", type=Path, help="an empty folder for results.json of each run")
    parser.add_argument("--append", type=Path, help="a file that gets the lines, too")
    parser.add_argument(
        "--modes", default=",".join(MODES), help="which runs, of " + ",".join(MODES)
    )
    parser.add_argument("--kv", default=ARMS, help="arms")
    parser.add_argument("--segments", default="80", help="windows")
    parser.add_argument("--niah-context", default="4096", help="tokens around a needle")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what was measured before")
    given = parser.parse_args()
    if given.table:
        print(table([json.loads(line) for line in given.table.read_text("utf-8").splitlines()]))
        return
    if not (given.model and given.text and given.out):
        parser.error("MODEL, TEXT and --out are needed to measure")
    for mode in given.modes.split(","):
        for line in measured(mode, given):
            print(json.dumps(line), flush=True)
            if given.append:
                with given.append.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def measured(mode: str, given: argparse.Namespace) -> Iterator[Json]:
    """Lines of one run."""
    common = ["--kv", given.kv, "--device", given.device]
    if mode == "rates":
        command = ["bench", "codec", *common]
        yield from rates(json.loads(run(command)), Path(given.model).name, given.kv, command)
        return
    options = {
        "prefill": ["--tasks", "ppl", "--segments", given.segments],
        "streaming": ["--tasks", "ppl", "--segments", given.segments, "--cache-mode", "streaming"],
        "needle": ["--tasks", "niah", "--niah-context", given.niah_context],
    }[mode]
    out, dtype = given.out / mode, ["--dtype", given.dtype]
    run(["eval", given.model, "--text", given.text, *common, *dtype, *options, "--out", str(out)])
    yield from lines(mode, json.loads((out / "results.json").read_text("utf-8")), given.kv)


def run(arguments: list[str]) -> str:
    """What one `layersweep` printed."""
    print("layersweep", *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "layersweep", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout


def lines(mode: str, results: Json, kv: str) -> Iterator[Json]:
    """A line for the run, named as the exact cache, and one for each arm of `kv`."""
    protocol, model = results["protocol"], Path(results["model"]["source"]).name
    of = {"mode": mode, "model": model}
    common = {
        "fingerprint": results["model"]["fingerprint"],
        "text_sha256": protocol["text_sha256"],
        **{name: protocol[name] for name in ("segments", "prefix", "continuation", "dtype")},
        "device": results["device"]["name"],
        "versions": results["versions"],
        "command": results["command"],
    }
    if mode == "needle":
        exact, *arms = results["needle"]["arms"]
        common |= {"contexts": results["needle"]["contexts"]}
        yield {"as": "exact", **of, **exact, **common, "trials": len(results["needle"]["trials"])}
        for written, arm in zip(kv.split(","), arms, strict=True):
            yield {"as": written, **of, **arm}
        return
    section = results["perplexity"]
    exact = section["baseline"]["kv_bytes"]
    yield {"as": "exact", **of, "arm": "exact", "ppl": section["baseline"]["ppl"], **common}
    for arm in section["arms"]:
        shown = {name: arm[name] for name in ("arm", *SHOWN, *PERPLEXITY)}
        bits = {at: 16 * arm["kv_bytes"][at] / exact[at] for at in ("4096", "32768")}
        yield {"as": arm["requested"], **of, **shown, "bits_at": bits}


def rates(found: Json, model: str, kv: str, command: list[str]) -> Iterator[Json]:
    """A line for the run, and one for each arm of `kv` whose codec was timed."""
    of = {"mode": "rates", "model": model}
    spoken = " ".join(["layersweep", *command])
    yield {"as": "exact", **of, "device": found["device"]["name"], "command": spoken}
    for written, row in zip(kv.split(","), found["rows"], strict=True):
        yield {"as": written, **of, "arm": row["job"], **{name: row[name] for name in RATES}}


def table(found: list[Json]) -> str:
    """Markdown, a table for each model."""
    models = dict.fromkeys(line["model"] for line in found)
    return "\n\n".join(_of_model([line for line in found if line["model"] == m]) for m in models)


HEADS = (
    "arm", "bits", "delta % [95 % CI]", "KL mean / p99.9", "bits, streaming", "delta %", "KL",
    "at 4K, 32K", "needles", "Mvectors/s in, out",
)  # fmt: skip


def _of_model(found: list[Json]) -> str:
    """An arm's row has its figures of all runs, under the name that was asked for."""
    runs = {mode: {line["as"]: line for line in found if line["mode"] == mode} for mode in MODES}
    exact = {mode: of["exact"] for mode, of in runs.items() if of}
    rows = [", ".join(_said(mode, line) for mode, line in exact.items()), ""]
    rows += [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    trials = exact.get("needle", {}).get("trials")
    for arm in dict.fromkeys(line["as"] for line in found if line["as"] != "exact"):
        prefill, streaming, needle, rate = (runs[mode].get(arm) for mode in MODES)
        cells = [f"`{arm}`", *_losses(prefill, interval=True), *_losses(streaming)]
        cells += [_bits_at(streaming or prefill), _needles(needle, trials), _rates(rate)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _said(mode: str, exact: Json) -> str:
    """A run in words."""
    if mode == "needle":
        found = f"the exact cache finds {exact['correct']} of {exact['trials']} needles"
        return f"{found} in {', '.join(map(str, exact['contexts']))} tokens"
    if mode == "rates":
        return f"rates on {exact['device']}"
    windows = f"{exact['segments']} windows of {exact['prefix']} + {exact['continuation']}"
    where = f"{exact['model']}, {exact['dtype']}, {exact['device']}, {windows}, "
    return where * (mode == "prefill") + f"ppl {exact['ppl']:.3f} in {mode}"


def _losses(line: Json | None, interval: bool = False) -> list[str]:
    """Cells of bits, loss and KL; empty where the arm was not measured."""
    if line is None or line["status"] != "ok":
        return ["" if line is None else line["status"], "", ""]
    loss = f"{line['delta_percent']:+.2f}"
    if interval and line["ci95"]:
        low, high = (100 * math.expm1(bound) for bound in line["ci95"])
        loss += f" [{low:+.2f}, {high:+.2f}]"
    kl = f"{line['kl_mean']:.4f}" + f" / {line['kl_p999']:.2f}" * interval
    return [f"{line['bits_per_element']:.2f}", loss, kl]


def _bits_at(line: Json | None) -> str:
    return ", ".join(f"{bits:.2f}" for bits in line["bits_at"].values()) if line else ""


def _needles(line: Json | None, trials: int | None) -> str:
    return f"{line['correct']}/{trials}, {line['answer_nll_delta']:+.3f}" if line else ""


def _rates(line: Json | None) -> str:
    return ", ".join(f"{line[name] / 1e6:.1f}" for name in RATES) if line else ""


if __name__ == "__main__":
    main()
