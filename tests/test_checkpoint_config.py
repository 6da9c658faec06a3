"""config.json: both spellings of RoPE, null head_dim, and refusals that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builders import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from layersweep.checkpoint import read_config
from layersweep.checkpoint.config import parse_config
from layersweep.errors import CheckpointError


def parsed(**changes: Any) -> Any:
    config, problems = parse_config(json.dumps(tiny_config() | changes).encode(), "config.json")
    return config if config is not None else [problem.sentence() for problem in problems]


def test_fields(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    config = read_config(tmp_path)
    assert config == read_config(tmp_path / "config.json")
    assert config.architecture == "MixtralForCausalLM"
    assert (config.vocab_size, config.hidden_size) == (128, 64)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-5)
    assert config.sliding_window is None
    assert not config.tie_word_embeddings
    assert not config.synthetic
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_flat_rope_theta_and_null_head_dim() -> None:
    config = parsed(rope_parameters=None, rope_theta=5e5, head_dim=None)
    assert (config.rope_theta, config.head_dim) == (5e5, 16)


def test_optional_fields() -> None:
    config = parsed(sliding_window=4096, eos_token_id=[2, 7], layersweep_synthetic=True)
    assert (config.sliding_window, config.eos_token_id, config.synthetic) == (4096, 2, True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, 'architectures = ["GPT2LMHeadModel"]'),
        ({"architectures": None, "model_type": "llama"}, 'architectures = "llama"'),
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
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu", needed "silu"'),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no", needed true or false'),
        ({"bos_token_id": -1}, "bos_token_id = -1"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_type = "yarn", needed "default"'),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            'rope_type = "linear"',
        ),
        ({"rope_theta": 5.0}, "rope_theta = 5.0, needed the rope_theta of rope_parameters"),
        ({"rope_parameters": [1]}, "rope_parameters = [1], needed an object"),
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(sorted(tiny_config())), value=json_values)
def test_any_value_is_read_or_refused(field: str, value: Any) -> None:
    config, problems = parse_config(json.dumps(tiny_config() | {field: value}).encode(), "c")
    assert (config is None) == bool(problems)
