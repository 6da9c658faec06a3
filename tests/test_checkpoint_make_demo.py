"""tools/make_demo.py: a bf16 checkpoint becomes the published NF4 layout."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from checkpoint_builders import dequantized_state_dict, read_tensors, tiny_checkpoint

from layersweep.checkpoint import nf4, open_checkpoint

TOOL = Path(__file__).resolve().parent.parent / "tools" / "make_demo.py"


def test_conversion(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "bf16", weights="bf16")
    (source / "tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": []}')
    convert = runpy.run_path(str(TOOL))["convert"]
    convert(source, tmp_path / "nf4", 3)
    checkpoint = open_checkpoint(str(tmp_path / "nf4"))
    assert (checkpoint.weights_kind, checkpoint.router_kind) == ("nf4", "nf4")
    assert len(checkpoint.files) == 3
    assert (tmp_path / "nf4" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in checkpoint.files)
    before, after = read_tensors(source), dequantized_state_dict(tmp_path / "nf4")
    name = "model.layers.1.self_attn.k_proj.weight"
    quantized = nf4.quantize(before[name])
    expected = nf4.dequantize(
        quantized.packed, quantized.scales(), 64, before[name].shape, torch.float32
    )
    assert torch.equal(after[name], expected)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"].float())
    with pytest.raises(SystemExit, match="already holds safetensors"):
        convert(source, tmp_path / "nf4", 3)
