"""Decoders with routed experts."""

from __future__ import annotations

from collections.abc import Mapping

from families.parts import (
    GROUPS,
    INDEXER,
    LATE_EXPERTS,
    LATENT,
    MULTIPLIERS,
    STRETCHED,
    THETA,
    WINDOWS,
    YARN,
    biased,
    rope,
    two_ropes,
)
from families.small import Tiny

EXPERTS: Mapping[str, Tiny] = {
    "mixtral": Tiny("mixtral", {"sliding_window": None}, published=True),
    "mixtral:window": Tiny("mixtral"),
    "qwen3_moe": Tiny("qwen3_moe", {"mlp_only_layers": [1]}, published=True),
    "qwen3_moe:plain": Tiny("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 2}),
    "qwen2_moe": Tiny("qwen2_moe", {"norm_topk_prob": False}),
    "olmoe": Tiny("olmoe", {"clip_qkv": 1.5, "norm_topk_prob": False}, published=True),
    "flex_olmo": Tiny("flex_olmo", still=("norm_topk_prob",)),  # a norm follows the experts
    "gpt_oss": Tiny(
        "gpt_oss",
        {"num_hidden_layers": 4, "swiglu_limit": 1.5, **YARN},
        published=True,
        still=("hidden_act",),
    ),
    "glm4_moe": Tiny(
        "glm4_moe",
        biased(use_qk_norm=True, **rope(partial_rotary_factor=0.5)),
        published=True,
    ),
    "glm4_moe:groups": Tiny("glm4_moe", GROUPS),
    "glm4_moe_lite": Tiny("glm4_moe_lite", {**LATENT, **LATE_EXPERTS}),
    "deepseek_v2": Tiny(
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "norm_topk_prob": False},
        published=True,
        still=("norm_topk_prob",),
        unfit=("topk_method",),
    ),
    "deepseek_v2:groups": Tiny(
        "deepseek_v2",
        {
            **LATENT,
            **GROUPS,
            "topk_method": "group_limited_greedy",
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
        still=("norm_topk_prob",),
    ),
    "deepseek_v3": Tiny("deepseek_v3", {**LATENT, **GROUPS}, published=True),
    "deepseek_v3:halves": Tiny(
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
    ),
    "granitemoe": Tiny("granitemoe", MULTIPLIERS),
    "granitemoeshared": Tiny("granitemoeshared", {"shared_intermediate_size": 80, **MULTIPLIERS}),
    "granitemoe_swa": Tiny(
        "granitemoe_swa",
        {
            **WINDOWS,
            "shared_intermediate_size": 80,
            **MULTIPLIERS,
        },
        still=("rope_parameters.rope_theta",),
    ),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1}
    ),
    "phimoe": Tiny(
        "phimoe", biased(lm_head_bias=True, sliding_window=None), still=("num_experts_per_tok",)
    ),
    "minimax_m2": Tiny("minimax_m2", rope(partial_rotary_factor=0.5)),
    "hunyuan_v1_moe": Tiny("hunyuan_v1_moe", {"moe_topk": 2}),
    "dots1": Tiny("dots1", {"max_window_layers": 2, **GROUPS}),
    "exaone_moe": Tiny("exaone_moe", {**WINDOWS}),
    "cohere2_moe": Tiny(
        "cohere2_moe",
        {"logit_scale": 0.8, "expert_selection_fn": "sigmoid", **WINDOWS},
        still=("layer_norm_eps", "rope_theta"),
    ),
    "afmoe": Tiny("afmoe", {**WINDOWS, "route_scale": 1.5, "mup_enabled": True}),
    "aria_text": Tiny("aria_text", {"moe_topk": 2}),
    "jetmoe": Tiny("jetmoe", {"kv_channels": 16}),
    "llama4_text": Tiny(
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 96,  # within one, all that came before is seen
            "floor_scale": 16,
            "no_rope_layers": [1, 1, 1, 0],
        },
        still=("attention_chunk_size",),
    ),
    "hy_v3": Tiny("hy_v3", {"router_scaling_factor": 1.5}),
    "laguna": Tiny(
        "laguna",
        {"moe_routed_scaling_factor": 1.5, **two_ropes({"rope_type": "default"})},
        unfit=("moe_apply_router_weight_on_input",),
    ),
    "mellum": Tiny("mellum", two_ropes(STRETCHED)),
    "mimo_v2_flash": Tiny("mimo_v2_flash", unfit=("layer_types",)),
    "minimax_m3_vl_text": Tiny(
        "minimax_m3_vl_text",
        {"dense_intermediate_size": 80, "shared_intermediate_size": 56, "rotary_dim": 16},
        still=(
            "hidden_act",
            "rotary_dim",
            "index_block_size",
            "index_local_blocks",
            "index_topk_blocks",
        ),
    ),
    "sarvam_moe": Tiny("sarvam_moe"),
    "sarvam_mla": Tiny("sarvam_mla", LATENT),
    "solar_open": Tiny("solar_open"),
    "flint": Tiny("flint", WINDOWS),
    "kolibri1": Tiny("kolibri1", WINDOWS),
    "axk1": Tiny("axk1", {**LATENT, **GROUPS}),
    "longcat_flash": Tiny(
        "longcat_flash",
        {
            "head_dim": 16,
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 48,
            "zero_expert_num": 2,
            "moe_topk": 3,
        },
    ),
    "dbrx": Tiny(
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": THETA},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 48,
                "moe_num_experts": 8,
                "moe_top_k": 2,
            },
        },
        still=("attn_config.rope_theta",),
    ),
    "deepseek_v32": Tiny("deepseek_v32", {**LATENT, **GROUPS, **INDEXER}),
    "glm_moe_dsa": Tiny("glm_moe_dsa", {**LATENT, **INDEXER}),
    "axk2": Tiny("axk2", {**LATENT, **INDEXER, "gated_norm_rank": 8}),
    "gemma4_text": Tiny(
        "gemma4_text",
        {
            **WINDOWS,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "final_logit_softcapping": 6.0,
            "enable_moe_block": True,
            "top_k_experts": 2,
        },
        unfit=("layer_types",),
    ),
}
