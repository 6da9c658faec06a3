"""Decoders some of whose layers keep a state instead of keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from families.parts import GROUPS, LINEAR, MAMBA, MULTIPLIERS
from families.small import WINDOW, Tiny

HYBRIDS: Mapping[str, Tiny] = {
    "qwen3_next": Tiny("qwen3_next", LINEAR),
    "qwen3_5_text": Tiny("qwen3_5_text", LINEAR),
    "qwen3_5_moe_text": Tiny("qwen3_5_moe_text", LINEAR),
    "lfm2": Tiny("lfm2", {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        {
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "bamba": Tiny("bamba", {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **MAMBA}),
    "jamba": Tiny(
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": Tiny(
        "granitemoehybrid",
        {
            **LINEAR,
            **MULTIPLIERS,
            **MAMBA,
            "shared_intermediate_size": 80,
            "position_embedding_type": "rope",
        },
    ),
    "falcon_h1": Tiny("falcon_h1", {"mamba_d_ssm": 128, "mamba_rms_norm": True, **MAMBA}),
    "nemotron_h": Tiny(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 32,
            "moe_shared_expert_intermediate_size": 80,
        },
        still=("sliding_window", "time_step_limit"),
    ),
    "olmo_hybrid": Tiny(
        "olmo_hybrid", {**LINEAR, "linear_num_value_heads": 2, "linear_value_head_dim": 16}
    ),
    "minimax": Tiny("minimax", {**LINEAR, "block_size": 32}),
    "recurrent_gemma": Tiny("recurrent_gemma", {"attention_window_size": WINDOW}),
    "mamba": Tiny("mamba"),
    "mamba2": Tiny(
        "mamba2",
        {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 32},
    ),
    "falcon_mamba": Tiny("falcon_mamba"),
    "zamba2": Tiny(
        "zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "use_mem_rope": True,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 16,
            "chunk_size": 32,
        },
    ),
    "kimi_linear": Tiny("kimi_linear", {**LINEAR, "linear_head_dim": 16, "linear_num_heads": 4}),
    "bailing_hybrid": Tiny("bailing_hybrid", {**LINEAR, **GROUPS}, still=("rope_theta",)),
    "lara_mini": Tiny("lara_mini"),
    "zaya": Tiny(
        "zaya",
        {"num_experts_per_tok": 1, "router_hidden_size": 16},
        still=(
            "sliding_window",
            "rope_parameters.hybrid_sliding.rope_theta",
            "rope_parameters.hybrid_sliding.partial_rotary_factor",
        ),
    ),
}
