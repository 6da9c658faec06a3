"""Published shapes: their size, what their caches hold, and studies of small models of each."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import tiny_study
from small_shapes import FEWER, small_shape

from layersweep.checkpoint.synth_shapes import SHAPES
from layersweep.cli.app import run
from layersweep.cli.synth import SHAPE_HELP
from layersweep.families.spec import Decoder
from layersweep.families.weights import blocks
from layersweep.kv import parse
from layersweep.model.compute import on_cpu
from layersweep.tasks.kv_bytes import kv_bytes

# Parameters, as their cards have them.
PUBLISHED = {
    "llama-3.1-8b": 8.03e9, "qwen3-30b-a3b": 30.53e9, "gpt-oss-20b": 20.91e9,
    "gpt-oss-120b": 116.83e9, "glm-4.5-air": 106.85e9, "deepseek-v2-lite": 15.71e9,
    "deepseek-v3": 671.03e9, "mixtral-8x7b": 46.70e9, "mixtral-8x22b": 140.63e9,
}  # fmt: skip


@cache
def decoder_of(name: str) -> Decoder:
    return SHAPES[name].decoder


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    sizes = (size for block in blocks(decoder_of(name)) for size in block.weights.values())
    assert sum(map(math.prod, sizes)) == pytest.approx(PUBLISHED[name], abs=0.005e9)


# --- small models of each ------------------------------------------------------------------------

CHECKS = {"finite", "peak within plan"}
ROUTED = CHECKS | {"experts used", "router spread"}


@pytest.mark.parametrize("name", FEWER)
def test_two_layers_of_a_shape_pass_the_gate_and_are_studied(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, name, small_shape(name))
    folder = tmp_path / "model"
    assert run(["synth", str(folder), "--shape", name, "--layers", "2"]) == 0
    assert f"{name}, 2 layers" in capsys.readouterr().out
    assert run(["inspect", str(folder)]) == 0
    assert "weights nf4" in capsys.readouterr().out
    asked = ("--kv", "lloyd:K3V2", "--tasks", "ppl", "--segments", "2", "--device", "cpu")
    assert run(tiny_study.words(*asked, "--json", model=folder)) == 0
    results = json.loads(capsys.readouterr().out)
    gate, (arm,) = results["gate"], results["perplexity"]["arms"]
    assert gate["passed"] and results["model"]["weights"] == "synthetic"
    # of weights that were never trained nothing is asked but that they can be computed
    wanted = CHECKS if name == "llama-3.1-8b" else ROUTED
    assert {check["name"] for check in gate["checks"]} == wanted
    assert arm["status"] == "ok" and arm["kl_mean"] > 0


def test_help_lists_every_shape() -> None:
    assert set(SHAPE_HELP.rstrip(".").replace(" or ", ", ").split(", ")) == set(SHAPES)


# --- bytes of the cache per token -----------------------------------------------------------------


def test_layers_with_a_window_hold_its_tokens_alone() -> None:
    """gpt-oss: every other layer sees 128 tokens, so the next one needs 127 of those before it."""
    found = kv_bytes(parse("exact"), decoder_of("gpt-oss-20b"), on_cpu())
    token = 2 * 8 * 64 * 2
    assert found == {str(n): 12 * token * (n + 127) / n for n in (4096, 32_768)}


def test_a_latent_is_512_numbers_and_the_key_that_all_heads_share_64() -> None:
    found = kv_bytes(parse("exact"), decoder_of("deepseek-v2-lite"), on_cpu())
    assert found == dict.fromkeys(("4096", "32768"), 27 * 576 * 2)


def test_layers_and_tokens_that_stay_exact_count_as_that() -> None:
    """4 of 32 layers at 16 bits; elsewhere 100 tokens, and the others at (3 + 2) / 2 bits and a
    16-bit scale per vector."""
    arm = parse("lloyd:K3V2@pb=2@sink=36@window=64")
    found = kv_bytes(arm, decoder_of("llama-3.1-8b"), on_cpu())
    layer, coded = 2 * 8 * 128, 2.5 + 16 / 128
    for tokens in (4096, 32_768):
        bits = 4 * 16 + 28 * (100 * 16 + (tokens - 100) * coded) / tokens
        assert found is not None and found[str(tokens)] == pytest.approx(layer * bits / 8)
