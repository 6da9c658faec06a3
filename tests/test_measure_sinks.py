"""tools/measure_sinks.py on a small model of random weights: no sinks, and sums that add up."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from cached_models import cached_model

TOOL = runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools/measure_sinks.py"))


def test_attention_is_shared_out_and_random_weights_have_no_sink(tmp_path: Path) -> None:
    model = cached_model("llama")
    model.save_pretrained(tmp_path)
    rows = torch.randint(2, 96, (2, 240), generator=torch.Generator().manual_seed(0))
    found = TOOL["measured"](str(tmp_path), rows)
    # 120 tokens, all alike to such a model
    assert 0.5 / 120 < found["first"] < 2 / 120
    assert 1.5 / 120 < found["next"] < 6 / 120
    assert (found["later_tokens"], found["later"], found["keys"]) == (0, 0, None)
