"""Rotary tables against transformers' own, which define them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_pairs
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as rotate_part
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from layersweep.families.spec import Rope
from layersweep.model import maths
from layersweep.model.ops import TorchOps
from layersweep.model.rope import attention_factor, inverse_frequencies, rope_table

HEAD, LONGEST = 96, 4096
SHORT = tuple(1 + 0.01 * i for i in range(HEAD // 2))
LONG = tuple(1 + 0.5 * i for i in range(HEAD // 2))
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}

# name -> (what our spec says, what config.json says)
KINDS: dict[str, tuple[Rope, dict[str, object]]] = {
    "default": (Rope(1e4, HEAD), {"rope_type": "default"}),
    "linear": (Rope(1e4, HEAD, "linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    "dynamic": (
        Rope(1e4, HEAD, "dynamic", factor=2.5, original_length=LONGEST),
        {"rope_type": "dynamic", "factor": 2.5},
    ),
    "llama3": (
        Rope(1e4, HEAD, "llama3", factor=8.0, original_length=1024),
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
        },
    ),
    "yarn": (
        Rope(1e4, HEAD, "yarn", factor=4.0, original_length=1024), {"rope_type": "yarn"} | YARN,
    ),
    "yarn of gpt_oss": (
        Rope(1e4, HEAD, "yarn", factor=4.0, original_length=1024, truncate=False),
        {"rope_type": "yarn", "truncate": False} | YARN,
    ),
    "yarn of deepseek": (
        Rope(
            1e4, HEAD, "yarn", factor=4.0, original_length=1024, mscale=0.7,
            mscale_all_dim=1.1, beta_fast=30.0, beta_slow=2.0,
        ),
        {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.1, "beta_fast": 30.0,
         "beta_slow": 2.0} | YARN,
    ),
    "yarn with a factor": (
        Rope(1e4, HEAD, "yarn", factor=4.0, original_length=1024, attention_factor=1.25),
        {"rope_type": "yarn", "attention_factor": 1.25} | YARN,
    ),
    "longrope": (
        Rope(
            1e4, HEAD, "longrope", factor=4.0, original_length=1024, short_factor=SHORT,
            long_factor=LONG,
        ),
        {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 1024,
            "short_factor": list(SHORT), "long_factor": list(LONG),
        },
    ),
    "proportional": (
        Rope(1e4, HEAD, "proportional", turning=0.25, factor=2.0),
        {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
    ),
}  # fmt: skip


def config_of(fields: dict[str, object]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD, num_attention_heads=4, head_dim=HEAD,
        max_position_embeddings=LONGEST, rope_parameters={"rope_theta": 1e4} | fields,
    )  # fmt: skip


def module_tables(fields: dict[str, object], length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of one forward pass over a sequence of that length."""
    module = LlamaRotaryEmbedding(config_of(fields))
    cos, sin = module(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("length", [1000, 1024, 1025, LONGEST, LONGEST + 1, 9000])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_a_forward_pass(kind: str, length: int) -> None:
    rope, fields = KINDS[kind]
    found = rope_table(rope, torch.arange(length), length)
    for ours, theirs in zip(found, module_tables(fields, length), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "default"])
def test_frequencies_are_those_of_transformers_function(kind: str) -> None:
    rope, fields = KINDS[kind]
    config = config_of(fields)
    theirs, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"), seq_len=1024)
    assert torch.equal(inverse_frequencies(rope, 1024), theirs)
    assert attention_factor(rope) == factor


def test_kinds_differ_from_the_default_and_two_depend_on_the_length() -> None:
    plain = inverse_frequencies(KINDS["default"][0], 1024)
    for kind in set(KINDS) - {"default", "dynamic"}:
        assert not torch.equal(inverse_frequencies(KINDS[kind][0], 1024), plain), kind
    changing = {
        kind
        for kind, (rope, _) in KINDS.items()
        if not torch.equal(inverse_frequencies(rope, 1000), inverse_frequencies(rope, 9000))
    }
    assert changing == {"dynamic", "longrope"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [HEAD, 32])
def test_rotation_of_a_part_of_a_head(dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 10, HEAD).to(dtype)
    cos, sin = rope_table(Rope(1e4, dim, interleaved=interleaved), torch.arange(14), 14)
    theirs = (rotate_pairs if interleaved else rotate_part)(
        x, x, cos[None, 4:].to(dtype), sin[None, 4:].to(dtype)
    )[0]
    assert torch.equal(maths.rope(x, cos[4:], sin[4:], interleaved=interleaved), theirs)
    out = torch.zeros_like(x)
    TorchOps().rope(x, cos, sin, 4, out, interleaved=interleaved)
    assert torch.equal(out, theirs)
    assert torch.equal(out[..., dim:], x[..., dim:])
