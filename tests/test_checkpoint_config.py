"""config.json: both spellings of RoPE, null head_dim, and refusals that name the field."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import VOCAB, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM

from layersweep.checkpoint import read_config
from layersweep.checkpoint.config import parse_config
from layersweep.errors import CheckpointError
from layersweep.families.foreign import HARMLESS
from layersweep.families.spec import Norm, Rope, Router


def parsed(**changes: Any) -> Any:
    read = parse_config(json.dumps(tiny_config() | changes).encode(), "config.json")
    return read.decoder or [problem.sentence() for problem in read.problems]


def test_fields(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    decoder = read_config(tmp_path)
    assert decoder == read_config(tmp_path / "config.json")
    assert decoder.architecture == "MixtralForCausalLM"
    assert (decoder.vocab_size, decoder.hidden_size) == (128, 64)
    assert decoder.norm == Norm(1e-5)
    assert len(decoder.layers) == 2 and decoder.layers[0] == decoder.layers[1]
    attention, feed = decoder.layers[0].attention, decoder.layers[0].feed
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 16)
    assert (attention.rope, attention.window) == (Rope(10000.0, 16), None)
    assert (feed.experts, feed.router) == (4, Router(2))
    assert not decoder.tie_word_embeddings
    assert not decoder.synthetic
    assert (decoder.bos_token_id, decoder.eos_token_id) == (1, 2)


def test_flat_rope_theta_and_null_head_dim() -> None:
    attention = parsed(rope_parameters=None, rope_theta=5e5, head_dim=None).layers[0].attention
    assert (attention.rope, attention.head_dim) == (Rope(5e5, 16), 16)


def test_optional_fields() -> None:
    decoder = parsed(sliding_window=4096, eos_token_id=[2, 7], layersweep_synthetic=True)
    assert decoder.layers[0].attention.window == 4096
    assert (decoder.eos_token_id, decoder.synthetic) == (2, True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, 'architectures = ["GPT2LMHeadModel"]'),
        ({"architectures": None, "model_type": "gpt0"}, 'model_type = "gpt0"'),
        ({"architectures": None, "model_type": "x", "auto_map": {"A": "x.Y"}}, "auto_map = {"),
        (
            {"architectures": None, "model_type": "llama4_text", "layer_types": ["full"]},
            "needed fields that transformers takes",
        ),
        ({"hidden_size": "64"}, 'hidden_size = "64", needed a positive integer'),
        ({"hidden_size": True}, "hidden_size = true, needed a positive integer"),
        ({"vocab_size": 0}, "vocab_size = 0, needed a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers = 1000"),
        ({"intermediate_size": None}, "intermediate_size = nothing"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0, needed a positive number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3, needed a divisor of the 4 heads"),
        ({"num_experts_per_tok": 5}, "needed at most num_local_experts = 4"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size = 66, needed a multiple of the 4"),
        ({"head_dim": 15}, "head_dim = 15, needed an even number"),
        ({"hidden_act": "tanh"}, 'hidden_act = "tanh", needed "silu"'),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no", needed true or false'),
        ({"bos_token_id": -1}, "bos_token_id = -1"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling.factor = nothing, needed a"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "ntk", "factor": 2}},
            'rope_type = "ntk", needed "default"',
        ),
        ({"rope_theta": 5.0}, "rope_theta = 5.0, needed the rope_theta of rope_parameters"),
        ({"rope_parameters": [1]}, "rope_parameters = [1], needed an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -4.0}}, "rope_scaling.factor = -4.0"),
        (
            {"rope_scaling": {"type": "default"}},  # transformers computes with its default
            "rope_parameters.rope_theta = 10000.0, needed 1000000.0",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "needed one RoPE for all"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, needed 1.0"),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config = {"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = ["),
        ({"model_type": "llama"}, 'model_type = "llama", needed "mixtral"'),
        ({"num_experts": 2}, "num_experts = 2, needed num_local_experts = 4, or nothing"),
        ({"quantization_config": {"quant_method": "aqlm"}}, 'quant_method = "aqlm"'),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0, needed nothing"),
        ({"norm_topk_prob": False}, "norm_topk_prob = false, needed nothing or true"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], expected: str) -> None:
    sentences = parsed(**changes)
    assert any(f"config.json: found {expected}" in s or expected in s for s in sentences), sentences


def test_all_wrong_fields_are_found_at_once() -> None:
    assert len(parsed(vocab_size=0, hidden_act="relu", rms_norm_eps="x")) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: found .*JSON") as caught:
        read_config(tmp_path)
    assert caught.value.hint


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: found no readable file"):
        read_config(tmp_path)


# None in a grid stands for null; where nothing is written, `...`
ROPE_OBJECTS: list[Any] = [
    *(..., None, {}, {"rope_theta": 1e4}, {"rope_theta": 5e4, "rope_type": "default"}),
    *({"type": "default"}, {"type": "default", "factor": 4.0}, {"rope_theta": None}),
    *({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 1.0, "rope_theta": 1e4}),
    *({"rope_type": "dynamic", "factor": 2.0}, {"rope_theta": 1e4, "type": "yarn", "factor": 2.0}),
    *({"rope_type": None, "rope_theta": 1e4}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
]


@pytest.mark.filterwarnings("ignore")
def test_rope_is_what_transformers_makes_of_the_same_file_or_is_refused(tmp_path: Path) -> None:
    """588 files: rope_parameters x rope_scaling x a flat rope_theta."""
    grid = itertools.product(ROPE_OBJECTS, ROPE_OBJECTS, (..., None, 1e4))
    accepted = 0
    for parameters, scaling, theta in grid:
        fields = {"rope_parameters": parameters, "rope_scaling": scaling, "rope_theta": theta}
        written = {name: value for name, value in fields.items() if value is not ...}
        plain = {k: v for k, v in tiny_config().items() if k != "rope_parameters"}
        raw = json.dumps(plain | written)
        decoder = parse_config(raw.encode(), "config.json").decoder
        if decoder is None:
            continue
        ours = decoder.layers[0].attention.rope
        accepted += 1
        (tmp_path / "config.json").write_text(raw)
        theirs = MixtralConfig.from_pretrained(tmp_path).rope_parameters
        assert theirs["rope_type"] == ours.kind, written
        assert theirs["rope_theta"] == ours.theta, written
        assert ours.kind == "default" or theirs["factor"] == ours.factor, written
        assert theirs.get("partial_rotary_factor", 1.0) == 1.0, written
    assert accepted == 168


def test_every_field_that_transformers_writes_for_a_mixtral_is_known() -> None:
    """One that a later release adds is listed as unused: read what it does, then place it."""
    fields = MixtralConfig(**tiny_config()).to_dict()
    read = parse_config(json.dumps(fields, default=str).encode(), "config.json")
    assert read.problems == []
    assert read.unused == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("attention_dropout", 0.5), ("router_jitter_noise", 0.3), ("router_aux_loss_coef", 1.0)),
        *(("initializer_range", 1.0), ("pad_token_id", 5), ("chunk_size_feed_forward", 4)),
        *(("output_router_logits", True), ("use_cache", False), ("is_decoder", False)),
    ],
)
def test_what_is_called_harmless_changes_no_logit_of_transformers(field: str, value: Any) -> None:
    assert field in HARMLESS
    ids = torch.arange(24)[None] % VOCAB
    logits = []
    for fields in (tiny_config(), tiny_config() | {field: value}):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**fields)).eval()
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            weight.data.normal_(std=0.2, generator=generator)
        with torch.inference_mode():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_fields_that_nothing_looks_at_are_listed() -> None:
    extra = {"my_scale": 2.0, "auto_map": {"AutoConfig": "x.Y"}, "sep_token_id": None}
    rope = {"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}
    read = parse_config(json.dumps(tiny_config() | extra | rope).encode(), "config.json")
    assert read.problems == []
    assert read.unused == ("my_scale", "auto_map", "rope_parameters.factor")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(sorted(tiny_config())), value=json_values)
def test_any_value_is_read_or_refused(field: str, value: Any) -> None:
    read = parse_config(json.dumps(tiny_config() | {field: value}).encode(), "c")
    assert (read.decoder is None) == bool(read.problems)
