"""`layersweep inspect`: what a person, and a program, see."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from checkpoint_builders import STATE, read_tensors, tiny_checkpoint, write_checkpoint

from layersweep.checkpoint.beside import shortened
from layersweep.checkpoint.synth_shapes import SHAPES
from layersweep.cli.inspect import inspect, layer_lines
from layersweep.errors import CheckpointError
from layersweep.families.spec import Attention, Feed, Layer, Router
from layersweep.families.words import describe_layer

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_identical_layers_and_experts_share_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(str(tiny_checkpoint(tmp_path)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "weights nf4, router nf4, 161.32 KiB in 1 file" in lines
    assert "layers 0-1: GQA 4/2 x 16, RoPE 10000; 4 experts x 96, 2 per token by softmax" in lines
    assert any(line.startswith("0-1 q_proj: nf4 1x2048 64x64 nested") for line in lines)
    assert any(line.startswith("attention_norm: bfloat16 64 64") for line in lines)
    assert "router: nf4 1x128 4x64 nested, blocks of 64 1.36 KiB" in lines
    assert any(line.startswith("experts 0-3 gate_proj: nf4 1x3072 96x64") for line in lines)
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
    assert "experts 0-1,3 gate_proj: bfloat16 96x64" in out
    assert "experts 2 gate_proj: float32 96x64" in out
    assert "weights mixed, router float16" in out


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(tiny_checkpoint(tmp_path)), json_output=True)
    content = json.loads(capsys.readouterr().out)
    assert content["problems"] == []
    assert content["bytes"] == sum(t.nbytes for t in read_tensors(tmp_path).values())
    router = content["weights"]["layers.0.router"]
    assert (router["stored"], router["shape"]) == ("nf4 1x128", [4, 64])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("llama-3.1-8b", ["layers 0-31: GQA 32/8 x 128, RoPE 500000 llama3 x 8; dense 14336"]),
        (
            "gpt-oss-20b",
            [
                f"layers {first} and 11 more: GQA 64/8 x 64, {window}sinks, biases, "
                "RoPE 150000 yarn x 32; 32 experts x 2880, 4 per token by softmax of their logits"
                for first, window in ((0, "window 128, "), (1, ""))
            ],
        ),
        (
            "glm-4.5-air",
            [
                "layer 0: GQA 96/8 x 128, biases, RoPE 1000000 on 64 of 128; dense 10944",
                "layers 1-45: GQA 96/8 x 128, biases, RoPE 1000000 on 64 of 128; 128 experts x "
                "1408, 8 per token by sigmoid, corrected, shared 1408",
            ],
        ),
        (
            "deepseek-v2-lite",
            [
                f"{layers}: latent 512 + 64, 16 x 192 (values 128), RoPE 10000 yarn x 40; {feed}"
                for layers, feed in (
                    ("layer 0", "dense 10944"),
                    (
                        "layers 1-26",
                        "64 experts x 1408, 6 per token by softmax, not renormalized, shared 2816",
                    ),
                )
            ],
        ),
    ],
)
def test_a_line_says_what_each_kind_of_layer_computes(shape: str, expected: list[str]) -> None:
    assert list(layer_lines(SHAPES[shape].decoder)) == expected


def test_softcap_and_what_else_is_rare() -> None:
    attention = Attention(8, 8, 96, 96, 0.1, None, softcap=50.0, qk_norm="all", clip=8.0)
    router = Router(6, "sigmoid", normalize=False, scale=2.5, groups=8, top_groups=4)
    feed = Feed(1408, experts=160, router=router, shared_inner=512, shared_gate=True)
    layer = Layer(attention, feed, None, None)
    assert describe_layer(layer) == (
        "MHA 8 x 96, softcap 50, q/k norm over all heads, clipped at 8; 160 experts x 1408, 6 per "
        "token by sigmoid, from 4 of 8 groups, not renormalized, scaled by 2.5, gated shared 512"
    )
    assert describe_layer(layer, foreign=True).endswith("clipped at 8; 160 experts x 1408")


UNUSED = [
    *("adapter_config.json", "adapter_model.safetensors", "configuration_x.py", "model.gguf"),
    *(
        "consolidated.00.pth",
        "pytorch_model-00001-of-00019.bin",
        "pytorch_model-00002-of-00019.bin",
    ),
]


def test_files_and_fields_that_are_not_used_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path)
    for name in [*UNUSED, "README.md", ".gitattributes", "tokenizer_config.json"]:
        (tmp_path / name).write_text("{}")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "configuration_x.X"}, "layer_scale": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    inspect(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "config fields read but not used: auto_map, layer_scale",
        "files not used: adapter_config.json, adapter_model.safetensors, configuration_x.py, "
        "consolidated.00.pth, model.gguf, pytorch_model-*-of-*.bin (2)",
    ]
    assert (
        "note: adapter_config.json is there and not applied: these are the weights without the "
        "adapter that transformers would load with peft"
    ) in lines
    inspect(str(tmp_path), json_output=True)
    content = json.loads(capsys.readouterr().out)
    assert content["unused_files"] == sorted(UNUSED)
    assert content["unused_config_fields"] == ["auto_map", "layer_scale"]


def test_names_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "caf\udce9")
    (folder / "x\udcff.py").touch()
    for json_output in (False, True):
        with redirect_stdout(TextIOWrapper(BytesIO(), encoding="utf-8")) as out:
            inspect(str(folder), json_output=json_output)
        out.seek(0)
        shown = out.read()
        assert "caf\\udce9" in shown
        assert "x\\udcff.py" in shown


def test_a_line_of_names_stays_short() -> None:
    names = [f"part{chr(97 + one)}.bin" for one in range(26)]
    assert shortened(names).endswith("parti.bin, partj.bin, 16 more")
    assert shortened(["a/1.bin", "a/x/2.bin", "b\x1b.py"]) == "a/* (2), b\\x1b.py"
    assert len(shortened(["n" * 10**6])) == 63


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
