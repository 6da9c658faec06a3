"""`layersweep plan` of published models, whose files hold headers and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from family_builders import SMALL, tensors_of, written
from sparse_checkpoints import Row, rows_of, write_sparse

from layersweep.checkpoint.synth_shapes import SHAPES, PublishedShape
from layersweep.cli.app import run
from layersweep.stream.rates import MACHINES

GIB = 2**30


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["plan", *arguments, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.mark.parametrize(
    ("shape", "machine", "weights", "stored", "peak"),
    [
        # bytes as model.safetensors.index.json of the published models has them
        ("qwen3-30b-a3b", "t4x2", "bf16", 61_064_245_248, 5.26),
        ("llama-3.1-8b", "rtx4090", "bf16", 16_060_522_496, 10.83),
        ("deepseek-v2-lite", "a100-80", "bf16", 31_412_968_448, 8.62),
        ("gpt-oss-20b", "t4x2", "nf4", 12_523_958_256, 6.36),
        ("gpt-oss-20b", "t4x2", "mxfp4", 13_761_264_768, 6.36),
    ],
)
def test_a_published_model_is_planned_from_its_headers(
    shape: str, machine: str, weights: str, stored: int, peak: float,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert write_sparse(tmp_path, SHAPES[shape], weights=weights) == stored
    planned(capsys, "demo", "--for", machine)  # compilers are warm after it
    started = time.process_time()
    content = planned(capsys, str(tmp_path), "--for", machine)
    assert time.process_time() - started < 3
    found = content["forecast"]
    # without the NF4 table and the JSON of each weight, which are not read again
    assert stored * 0.99 < found["read_bytes"] <= stored
    assert found["sweeps"] == 1 and found["plan"]["vram"] == MACHINES[machine].vram
    assert found["plan"]["device_bytes"] / GIB == pytest.approx(peak, rel=0.02)
    assert found["first_read_s"] == pytest.approx(found["read_bytes"] / MACHINES[machine].disk)
    assert min(found["perplexity_s"], found["needle_s"], found["total_s"]) > 1


def draft_layer(shape: PublishedShape) -> list[Row]:
    """The layer behind DeepSeek-V3's last one: a layer, a projection, and tables of its own."""
    layers, hidden = shape.decoder.num_hidden_layers, shape.decoder.hidden_size
    at, table = f"model.layers.{layers}.", (shape.decoder.vocab_size, hidden)
    beside = {
        "eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,),
        "shared_head.norm": (hidden,), "shared_head.head": table, "embed_tokens": table,
    }  # fmt: skip
    rows = rows_of(shape.with_layers(layers + 1), "fp8")
    return [
        *(row for row in rows if row.name.startswith(at)),
        *(Row(f"{at}{name}.weight", "BF16", size) for name, size in beside.items()),
    ]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DeepSeek-V3 in FP8 and gpt-oss-120b in MXFP4, as published."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("deepseek-v3", "gpt-oss-120b")}
    fp8, mxfp4 = (SHAPES[name] for name in folders)
    drafts = draft_layer(fp8)
    fp8 = fp8.with_fields({"num_nextn_predict_layers": 1})
    assert write_sparse(folders["deepseek-v3"], fp8, weights="fp8", beside=drafts) == (
        688_574_839_360  # its index says 688,586,727,753, headers included
    )
    assert write_sparse(folders["gpt-oss-120b"], mxfp4, weights="mxfp4") == 65_248_815_744
    return folders


@pytest.mark.parametrize(
    ("name", "machine", "sweeps", "peak", "read"),
    [
        # 673.15 GB without the layer for multi-token prediction, as often as it is swept
        ("deepseek-v3", "t4x2", 2, 13.87, 1346.3e9),
        pytest.param("deepseek-v3", "rtx4090", 1, 22.01, 673.15e9, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", "a100-80", 1, 28.17, 673.15e9, marks=pytest.mark.slow),
        ("gpt-oss-120b", "t4x2", 1, 6.98, 65.249e9),
        ("gpt-oss-120b", "rtx4090", 1, 11.75, 65.249e9),
        ("gpt-oss-120b", "a100-80", 1, 11.75, 65.249e9),
    ],
)
def test_models_of_120_and_671_billion_are_planned_in_seconds(
    name: str, machine: str, sweeps: int, peak: float, read: float,
    large: dict[str, Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    started = time.process_time()
    found = planned(capsys, str(large[name]), "--for", machine)["forecast"]
    # of 91,991 tensors: 2.4 s alone; a core that others use, too, may take twice as long
    assert time.process_time() - started < 8
    assert (found["sweeps"], found["plan"]["vram"]) == (sweeps, MACHINES[machine].vram)
    assert found["read_bytes"] == pytest.approx(read, rel=0.001)
    assert found["plan"]["device_bytes"] / GIB == pytest.approx(peak, rel=0.01)
    assert found["total_s"] >= found["read_bytes"] / MACHINES[machine].disk


def test_layers_for_multi_token_prediction_are_not_planned_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As GLM-4.5-Air is published; 2 of its 46 layers."""
    shape = SHAPES["glm-4.5-air"].with_layers(2).with_fields({"num_nextn_predict_layers": 1})
    drafts = {"eh_proj": (4096, 8192), "self_attn.q_proj": (12_288, 4096), "enorm": (4096,)}
    beside = [Row(f"model.layers.2.{name}.weight", "BF16", size) for name, size in drafts.items()]
    stored = write_sparse(tmp_path, shape, weights="bf16", beside=beside)
    content = planned(capsys, str(tmp_path), "--for", "a100-80", "--kv", "e8:K3V2")
    assert stored - content["forecast"]["read_bytes"] == 2 * 4096 * (8192 + 12_288 + 1)
    assert content["notes"] == ["layer 2 is for multi-token prediction: it is not run"]
    assert run(["plan", str(tmp_path), "--for", "a100-80", "--kv", "e8:K3V2"]) == 0
    assert "note: layer 2 is for multi-token prediction: it" in capsys.readouterr().out


def test_arms_that_do_not_take_the_heads_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**SMALL, "model_type": "llama", "head_dim": 80, "max_position_embeddings": 8192}
    folder = written(tmp_path, fields, tensors_of("llama", fields))
    asked = (folder, "--for", "t4", "--kv")
    left_out = planned(capsys, *asked, "all")["left_out"]
    assert [one["wanted"] for one in left_out] == [
        *("kivi:K3V2", "kivi:K4V2", "int4", "int2", "q8_0", "q5_0", "q4_0")
    ]
    assert run(["plan", *asked, "all"]) == 0
    why = "int4: stream 'k' has head size 80, needed a multiple of 64"
    assert f"fallback: --kv all: wanted int4, used nothing: left out: {why}\n" in (
        capsys.readouterr().out
    )
    assert run(["plan", *asked, "int4"]) == 2
    assert f"error: {why}" in capsys.readouterr().err
