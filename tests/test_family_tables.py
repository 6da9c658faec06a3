"""Tables of families without weights: defaults beside transformers' own, published spellings of
config.json, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from family_builders import GLM_MOE, LATENT, SMALL, decoder_of, described, tensors_of, written

from layersweep.checkpoint.layout import open_checkpoint
from layersweep.errors import CheckpointError
from layersweep.families.family import Family
from layersweep.families.registry import FAMILIES


def complaint(model_type: str, fields: Mapping[str, object] = SMALL, **more: object) -> str:
    problems = described(model_type, fields, **more).problems
    return "; ".join(f"{one.found}, needed {one.needed}" for one in problems)


SIZES = {
    "vocab_size": 64, "hidden_size": 7680, "intermediate_size": 24, "num_hidden_layers": 7,
    "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(family: Family) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type] == family.architecture
    # a multiple of the KV heads that it has when nothing is said
    twenty = family.model_type in ("glm4_moe_lite", "helium")
    given = SIZES | {"num_attention_heads": 20 if twenty else 128}
    whole = CONFIG_MAPPING[family.model_type](**given).to_dict()
    assert decoder_of(family.model_type, given) == decoder_of(family.model_type, whole)


def test_layers_for_multi_token_prediction_are_left_out_and_said(tmp_path: Path) -> None:
    """Published GLM-4.5 and DeepSeek-V3 hold one more layer than num_hidden_layers."""
    fields = {**GLM_MOE, "num_nextn_predict_layers": 1}
    tensors = tensors_of("glm4_moe", fields)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(16, 32)
    checkpoint = open_checkpoint(written(tmp_path, fields, tensors))
    assert checkpoint.nbytes == whole
    assert "layer 2 is for multi-token prediction: it is not run" in checkpoint.notes


def test_a_layer_beyond_those_is_refused(tmp_path: Path) -> None:
    fields = {**GLM_MOE, "num_nextn_predict_layers": 1}
    tensors = tensors_of("glm4_moe", fields)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(16, 32)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj.*unexpected"):
        open_checkpoint(written(tmp_path, fields, tensors))


def test_a_vector_may_be_stored_as_one_row(tmp_path: Path) -> None:
    """As ERNIE 4.5 stores e_score_correction_bias."""
    fields = {
        **SMALL, "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2,
        "moe_intermediate_size": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = tensors_of("ernie4_5_moe", fields)
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    tensors[name] = torch.arange(4.0)[None]
    checkpoint = open_checkpoint(written(tmp_path, fields, tensors))
    assert checkpoint.weights["layers.1.router_correction"].shape == (4,)
    tensors[name] = torch.zeros(4, 1)
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        open_checkpoint(written(tmp_path, fields, tensors))


WINDOW = "sliding_window = nothing, needed a positive integer"
REFUSED: list[tuple[str, Mapping[str, object], dict[str, object], str]] = [
    ("qwen2", SMALL, {"layer_types": ["sliding_attention"] * 2}, "needed a window, which layer"),
    ("qwen3_moe", SMALL, {"mlp_only_layers": "0"}, 'mlp_only_layers = "0", needed a list'),
    ("qwen3_moe", SMALL, {"num_experts": 4, "num_local_experts": 8}, "num_local_experts = 8"),
    ("llama", SMALL, {"qk_norm": True}, "qk_norm = true, needed nothing or false"),
    ("olmoe", SMALL, {"clip_qkv": -1.0}, "clip_qkv = -1.0, needed a positive number"),
    ("phi3", SMALL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type = "linear"'),
    ("gemma2", SMALL, {"sliding_window": None}, WINDOW),
    ("gemma2", SMALL, {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
    ("gemma", SMALL, {"hidden_activation": "silu"}, 'hidden_activation = "silu"'),
    ("gemma3_text", SMALL, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", SMALL, {"rope_parameters": {"rope_theta": 1e4}}, "a RoPE for each type"),
    ("gpt_oss", SMALL, {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0, needed 1.702"),
    ("glm4_moe", GLM_MOE, {"n_group": 3}, "n_group = 3, needed a divisor of 4 experts"),
    ("glm4_moe", GLM_MOE, {"n_group": 4}, "n_group = 4, needed a divisor of 4 experts, 2 or more"),
    ("glm4_moe", GLM_MOE, {"topk_group": 2}, "topk_group = 2, needed up to 1 groups"),
    ("glm4_moe", GLM_MOE, {"scoring_func": "softmax"}, 'scoring_func = "softmax"'),
    ("deepseek_v2", LATENT, {"norm_topk_prob": True}, "norm_topk_prob = true, needed false"),
    ("deepseek_v2", LATENT, {"topk_method": "noaux_tc"}, 'topk_method = "noaux_tc"'),
    ("deepseek_v2", LATENT, {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("deepseek_v2", LATENT, {"attention_bias": True}, "attention_bias = true"),
    ("deepseek_v2", LATENT, {"num_key_value_heads": 2}, "num_key_value_heads = 2, needed 4"),
    (
        "deepseek_v3", {**LATENT, "n_group": 4, "topk_group": 1},
        {"num_experts_per_tok": 3}, "topk_group = 1, needed up to 4 groups that hold 3 experts",
    ),
    (
        "deepseek_v3", {**LATENT, "n_group": 1, "topk_group": 1},
        {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type = "linear"',
    ),
    ("smollm3", SMALL, {"no_rope_layers": [1]}, "no_rope_layers = [1], needed 0 or 1 for each"),
    ("ernie4_5_moe", SMALL, {"use_bias": True}, "use_bias = true"),
    ("ernie4_5_moe", SMALL, {"moe_norm_min": 0.5}, "moe_norm_min = 0.5, needed 1e-12"),
    ("granite", SMALL, {"residual_multiplier": 0}, "residual_multiplier = 0, needed a positive"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "fields", "changed", "expected"), REFUSED)
def test_what_cannot_be_computed_is_refused_by_its_field(
    model_type: str, fields: Mapping[str, object], changed: dict[str, object], expected: str
) -> None:
    assert complaint(model_type, fields) == ""
    assert expected in complaint(model_type, fields, **changed)


def test_gemma_3_as_published_has_two_thetas() -> None:
    decoder = decoder_of(
        "gemma3_text", {**SMALL, "num_hidden_layers": 6, "head_dim": 8},
        rope_theta=1e6, rope_local_base_freq=1e4, sliding_window=8, sliding_window_pattern=6,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, query_pre_attn_scalar=64,
    )  # fmt: skip
    ropes = [layer.attention.rope for layer in decoder.layers]
    assert [rope and (rope.theta, rope.factor) for rope in ropes] == [(1e4, 1.0)] * 5 + [(1e6, 8.0)]
    assert [layer.attention.window for layer in decoder.layers] == [8] * 5 + [None]
    assert decoder.layers[0].attention.scale == 1 / 8


def test_phi_3_as_published_stretches_by_the_ratio_of_its_lengths() -> None:
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    decoder = decoder_of(
        "phi3", rope_scaling={"type": "su", **factors},
        max_position_embeddings=131_072, original_max_position_embeddings=4096,
    )  # fmt: skip
    rope = decoder.layers[0].attention.rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.original_length) == ("longrope", 32.0, 4096)
    assert rope.long_factor == (2.0, 3.0)


def test_deepseek_v3_as_published() -> None:
    """Its fields with other sizes; YaRN's second mscale widens the scores, too."""
    rope = {
        "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    found = described(
        "deepseek_v3", {**LATENT, "num_hidden_layers": 4, "q_lora_rank": 12},
        rope_scaling=rope, scoring_func="sigmoid", topk_method="noaux_tc", n_group=4, topk_group=2,
        moe_layer_freq=1, first_k_dense_replace=3, ep_size=1, num_nextn_predict_layers=1,
        n_shared_experts=2, routed_scaling_factor=2.5,
    )  # fmt: skip
    assert found.problems == []
    assert found.unused == ("ep_size",)
    assert found.decoder is not None
    dense, routed = found.decoder.layers[2], found.decoder.layers[3]
    assert (dense.feed.routed, dense.feed.inner) == (False, 24)
    assert (routed.feed.inner, routed.feed.shared_inner) == (8, 16)
    router = routed.feed.router
    assert router is not None
    assert (router.score, router.group_score, router.scale) == ("sigmoid", "top2", 2.5)
    assert (router.groups, router.top_groups, router.float32) == (4, 2, True)
    spread = 0.1 * math.log(40) + 1
    assert routed.attention.scale == pytest.approx(16**-0.5 * spread**2)
    assert routed.attention.norm is not None
    assert routed.attention.norm.eps == 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_gpt_oss_with_a_tensor_for_each_expert_and_with_one_for_all(
    tmp_path: Path, fused: bool
) -> None:
    fields = {**SMALL, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
    tensors = tensors_of("gpt_oss", fields, fused=fused)
    checkpoint = open_checkpoint(written(tmp_path, fields, tensors))
    assert checkpoint.weights["layers.1.experts.3.gate_up_proj"].shape == (48, 16)
    assert checkpoint.weights["layers.1.experts.3.down_bias"].shape == (16,)


def test_a_proportional_rope_is_as_wide_as_the_head() -> None:
    """Of its pairs only a share turns, unlike with every other kind."""
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    kinds = {"default": (8, 1.0), "proportional": (16, 0.5)}
    for kind, (dim, turning) in kinds.items():
        parts = {**rope, "rope_type": kind}
        found = decoder_of("glm", {**SMALL, "head_dim": 16}, rope_parameters=parts)
        made = found.layers[0].attention.rope
        assert made is not None
        assert (made.dim, made.turning) == (dim, turning)


def test_gpt_oss_as_published_stretches_as_its_file_says() -> None:
    """What a family stretches by where nothing is said is not held against the file."""
    scaling = {
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    decoder = decoder_of("gpt_oss", rope_theta=150_000, rope_scaling=scaling, sliding_window=8)
    rope = decoder.layers[0].attention.rope
    assert rope is not None
    assert (rope.theta, rope.factor, rope.truncate) == (150_000.0, 8.0, False)
    assert [layer.attention.window for layer in decoder.layers] == [8, None]
