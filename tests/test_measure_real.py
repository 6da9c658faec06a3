"""tools/measure_real.py: a line for each arm of a run, and the table made of them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

from results_builders import build_results

from layersweep.kv import parse_arms

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TOOL = runpy.run_path(str(TOOLS / "measure_real.py"))


def lines(mode: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """As a file has them."""
    for arm in results["perplexity"]["arms"]:
        arm["requested"] = arm["arm"]  # a bare name serves several there
    kv = ",".join(arm["arm"] for arm in results["perplexity"]["arms"])
    return [json.loads(json.dumps(line)) for line in TOOL["lines"](mode, results, kv)]


def test_runs_share_the_row_of_an_arm() -> None:
    results = build_results()
    found = [line for mode in ("prefill", "streaming", "needle") for line in lines(mode, results)]
    assert [line["as"] for line in found[:2]] == ["exact", "lloyd:K3V2"]
    assert found[0]["command"] == results["command"]
    timed = [{"job": "lloyd:K3V2", "encode_vectors_per_s": 2e6, "decode_vectors_per_s": 3.14e6}]
    speed = {"rows": timed, "device": {"name": "a GPU"}}
    found += TOOL["rates"](speed, "demo", "lloyd:K3V2", ["bench", "codec"])
    head, _, names, _, first, second, *_ = TOOL["table"](found).splitlines()
    assert head.startswith("demo, float32, ")
    assert ", 80 windows of 1024 + 512, ppl " in head
    assert head.endswith("rates on a GPU")
    assert names.count("|") == first.count("|") == second.count("|") == 11
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[:2] == ["`lloyd:K3V2`", "2.69"]
    assert cells[2].startswith("+0.") and "[" in cells[2]
    assert cells[4:6] == ["2.69", cells[2].split(" ")[0]]
    assert cells[7] == "2.69, 2.69"
    assert "/60, " in cells[8]
    assert cells[9] == "2.0, 3.1"


def test_what_was_not_measured_is_empty() -> None:
    _, _, _, _, first, *_ = TOOL["table"](lines("streaming", build_results())).splitlines()
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[1:4] == [*cells[8:], ""] == ["", "", ""]
    assert cells[4] == "2.69"


def test_every_arm_of_the_study_is_one_in_both_modes() -> None:
    """The defaults, the published method, and what others ship."""
    asked = TOOL["ARMS"].split(",")
    prefill, streaming = (
        {arm.requested: arm.name for arm in parse_arms(TOOL["ARMS"], growing=growing)}
        for growing in (False, True)
    )
    assert list(prefill) == list(streaming) == asked
    assert len(asked) == 39
    assert prefill["K3V2"] == "trellis:K3V2@fit=1@found=1"
    assert streaming["K3V2"] == "trellis:K3V2@fit=1@found=1@window=8@block=16@fine=96"
    assert {"e8:K3V2", "e8:K3V2@sink=4", "turboquant:K3V3", "int4"} < set(asked)
