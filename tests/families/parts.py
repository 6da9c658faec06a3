"""Fields that several families share: kinds of RoPE, of layers, of routing."""

from __future__ import annotations

from collections.abc import Mapping

THETA = 10_000.0
ALTERNATING = ["sliding_attention", "full_attention"] * 2
WINDOWS = {"num_hidden_layers": 4, "layer_types": ALTERNATING}


def rope(rope_type: str = "default", **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": THETA, "rope_type": rope_type, **more}}


def two_ropes(full: Mapping[str, object], theta: float = 1_000.0) -> dict[str, object]:
    """One RoPE for the layers that see everything, a plain one of `theta` for windows."""
    return {
        "num_hidden_layers": 4,
        "layer_types": ALTERNATING,
        "rope_parameters": {
            "full_attention": {"rope_theta": 50_000.0, **full},
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


STRETCHED = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
YARN = {"rope_parameters": {"rope_theta": THETA, **STRETCHED}}
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip


def long_rope(original: int) -> dict[str, object]:
    """Beyond `original` tokens the long factors are taken; 16 pairs of a head."""
    parts = rope(
        "longrope",
        short_factor=[1.0 + 0.05 * pair for pair in range(16)],
        long_factor=[1.0 + 0.5 * pair for pair in range(16)],
        original_max_position_embeddings=original,
    )
    return {"hidden_size": 128, "original_max_position_embeddings": original, **parts}


LATENT = rope(
    "yarn", factor=8.0, mscale=0.8, mscale_all_dim=0.6, beta_fast=32.0, beta_slow=1.0,
    original_max_position_embeddings=64,
)  # fmt: skip
# attention to the tokens that an indexer chooses
INDEXER = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 2}
GROUPS = {"n_group": 4, "topk_group": 2}
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.25,
}
MAMBA = {"mamba_n_groups": 2, "mamba_conv_bias": True}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
LINEAR = {"num_hidden_layers": 4, "layer_types": HYBRID}
LATE_EXPERTS = {"mlp_layer_types": ["dense", "sparse", "sparse"]}


def biased(**more: object) -> dict[str, object]:
    return {"attention_bias": True, **more}
