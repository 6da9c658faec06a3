"""tools/measure_real.py: a line for each arm of a run, and the table made of them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from results_builders import build_results

from layersweep.kv import parse_arms

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TOOL = runpy.run_path(str(TOOLS / "measure_real.py"))


def test_lines_carry_their_run_and_make_the_table() -> None:
    results = build_results()
    found = [json.loads(json.dumps(line)) for line in TOOL["lines"](results)]
    assert [line["arm"] for line in found[:2]] == ["exact", "lloyd:K3V2"]
    assert len(found) == 5
    for line in found:
        assert line["command"] == results["command"]
        assert (line["real"], line["segments"], line["dtype"]) == ("prefill", 80, "float32")
    head, _, _, _, first, *_ = TOOL["table"](found).splitlines()
    assert head.startswith("demo, 80 windows, 1024 + 512, prefill, float32,")
    assert first.startswith("| `lloyd:K3V2` | 2.69 | +0.")
    assert first.count("|") == 7


def test_every_arm_of_the_study_is_one() -> None:
    """The published method, and the default with what it needs and without."""
    prefill, streaming = (
        [arm.name for arm in parse_arms(TOOL[n], growing=n == "STREAMING")]
        for n in ("PREFILL", "STREAMING")
    )
    for names in (prefill, streaming):
        assert {"trellis:K3V2", "e8:K3V2"} < set(names)
    assert "trellis:K3V2@fit=1@found=1" in prefill
    assert "trellis:K3V2@fit=1@found=1@window=8@block=16@fine=96" in streaming
    assert (len(prefill), len(streaming)) == (25, 9)


def test_reference_methods_share_a_row_in_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = runpy.run_path(str(TOOLS / "measure_reference.py"))
    found = list(tool["lines"](build_results()))
    both = [*found, *({**line, "mode": "streaming"} for line in found[:1])]
    _, _, first, second, *_ = tool["table"](both).splitlines()
    loss, kl = first.split(" | ")[2], first.split(" | ")[4]
    assert first.split(" | ")[5:7] == [loss, kl]
    assert first.endswith("| 2.69 | 2.69 |")
    assert second.count("|") == 10
    assert "|  |  |" in second
