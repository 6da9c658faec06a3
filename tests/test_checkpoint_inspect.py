"""`layersweep inspect`: what a person, and a program, see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_builders import STATE, read_tensors, tiny_checkpoint, write_checkpoint

from layersweep.cli.inspect import inspect
from layersweep.errors import CheckpointError

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_identical_layers_and_experts_share_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(str(tiny_checkpoint(tmp_path)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "weights nf4, router nf4, 161.32 KiB in 1 file" in lines
    assert any(line.startswith("0-1 input_norm: bfloat16 64 64") for line in lines)
    assert "router: nf4 1x128 4x64 nested, blocks of 64 1.36 KiB" in lines
    assert any(line.startswith("experts 0-3 w1: nf4 1x3072 96x64") for line in lines)
    assert "note: the router is stored in 4 bits" in lines
    assert sum("router" in line and "1x128" in line for line in lines) == 1


def test_float_router_and_a_layer_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path, weights="mixed", router="float")
    tensors = read_tensors(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    write_checkpoint(tmp_path, tensors | {name: tensors[name].float()}, 1)
    inspect(str(tmp_path))
    out = capsys.readouterr().out
    assert out.count("router: float16 4x64") == 2
    assert "experts 0-1,3 w1: bfloat16 96x64" in out
    assert "experts 2 w1: float32 96x64" in out
    assert "weights mixed, router float16" in out


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(tiny_checkpoint(tmp_path)), json_output=True)
    content = json.loads(capsys.readouterr().out)
    assert content["problems"] == []
    assert content["bytes"] == sum(t.nbytes for t in read_tensors(tmp_path).values())
    router = content["weights"]["layers.0.router"]
    assert (router["stored"], router["shape"]) == ("nf4 1x128", [4, 64])


@pytest.mark.parametrize("json_output", [False, True])
def test_every_problem_is_printed_and_the_exit_code_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], json_output: bool
) -> None:
    tiny_checkpoint(tmp_path)
    dropped = ["model.norm.weight", f"{Q_PROJ}.absmax", Q_PROJ.replace("q_", "k_") + STATE]
    tensors = {n: t for n, t in read_tensors(tmp_path).items() if n not in dropped}
    write_checkpoint(tmp_path, tensors, 1)
    with pytest.raises(CheckpointError, match="found 3 problems, needed none") as caught:
        inspect(str(tmp_path), json_output=json_output)
    assert caught.value.exit_code == 2
    out = capsys.readouterr().out
    if json_output:
        assert len(json.loads(out)["problems"]) == 3
    else:
        lines = [line for line in out.splitlines() if line.startswith("problem: ")]
        assert len(lines) == 3
        assert f"{Q_PROJ}: found 4-bit data without absmax" in lines[0]
        assert "without quant_state, which holds their offset" in lines[1]
        assert "model.norm.weight: found no such tensor" in lines[2]
