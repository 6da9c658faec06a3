"""TINY: a small config.json for each decoder, with everything that its family can do switched on.

A name is a model type, or `model_type:variant`. What is not said here comes from `small.SMALL` and
from the type's own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping

from families.small import WINDOW, Tiny

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


DENSE: Mapping[str, Tiny] = {
    "llama": Tiny("llama"),
    "llama:bias": Tiny("llama", biased(mlp_bias=True), published=True),
    "llama:tied": Tiny("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama:llama3": Tiny("llama", LLAMA3, published=True),
    "llama:linear": Tiny("llama", rope("linear", factor=2.0), published=True),
    "llama:dynamic": Tiny(
        "llama", {"max_position_embeddings": 64, **rope("dynamic", factor=2.0)}, published=True
    ),
    "llama:yarn": Tiny("llama", YARN, published=True),
    "mistral": Tiny("mistral", published=True),
    "ministral": Tiny("ministral", {**WINDOWS}),
    "ministral3": Tiny(
        "ministral3",
        rope(**STRETCHED, mscale=0.8, mscale_all_dim=0.6, llama_4_scaling_beta=0.1),
    ),
    "qwen2": Tiny("qwen2", published=True),
    "qwen2:window": Tiny("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": Tiny("qwen3", biased()),
    "olmo": Tiny("olmo", {"clip_qkv": 1.5}),
    "olmo2": Tiny("olmo2"),
    "olmo3": Tiny(
        "olmo3",
        two_ropes(STRETCHED, 50_000.0),
        still=("rope_parameters.full_attention.beta_fast",),  # 32 and 3.2: before the first pair
    ),
    "phi": Tiny("phi", {"qk_layernorm": True, **rope(partial_rotary_factor=0.5)}),
    "phi3": Tiny(
        "phi3", rope(partial_rotary_factor=0.5), still=("original_max_position_embeddings",)
    ),
    "phi3:longrope": Tiny(
        "phi3",
        long_rope(32),
        published=True,
        still=("rope_scaling.short_factor", "rope_scaling.original_max_position_embeddings"),
        unfit=("partial_rotary_factor",),
    ),
    "phi3:shortrope": Tiny(
        "phi3",
        long_rope(256),
        still=("rope_parameters.long_factor", "rope_parameters.original_max_position_embeddings"),
        unfit=("rope_parameters.partial_rotary_factor",),
    ),
    "gemma": Tiny("gemma", published=True),
    "gemma2": Tiny(
        "gemma2",
        {
            "num_hidden_layers": 4, "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0,
        },
        published=True,
    ),
    "gemma3_text": Tiny(
        "gemma3_text",
        {"query_pre_attn_scalar": 20, **two_ropes({"rope_type": "linear", "factor": 2.0})},
    ),
    "vaultgemma": Tiny(
        "vaultgemma",
        {
            "num_hidden_layers": 4, "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0,
        },
    ),
    "glm": Tiny("glm", rope(partial_rotary_factor=0.5)),
    "glm4": Tiny("glm4", rope(partial_rotary_factor=0.5)),
    "granite": Tiny("granite", biased(mlp_bias=True, **MULTIPLIERS)),
    "cohere": Tiny("cohere", {"logit_scale": 0.8, "use_qk_norm": True}),
    "cohere2": Tiny(
        "cohere2", {"logit_scale": 0.8, **WINDOWS}
    ),
    "starcoder2": Tiny("starcoder2"),
    "stablelm": Tiny(
        "stablelm", {"use_qkv_bias": True, "qk_layernorm": True, **rope(partial_rotary_factor=0.25)},
        unfit=("use_parallel_residual",),
    ),
    "smollm3": Tiny("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "sliding_window": None}),
    "ernie4_5": Tiny("ernie4_5", {"use_bias": True}),
    "exaone4": Tiny("exaone4", {**WINDOWS}),
    "seed_oss": Tiny("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "helium": Tiny("helium", {"head_dim": 16}),
    "nemotron": Tiny("nemotron", biased(mlp_bias=True, **rope(partial_rotary_factor=0.5))),
    "hunyuan_v1_dense": Tiny("hunyuan_v1_dense"),
    "nanochat": Tiny("nanochat", {"final_logit_softcapping": 6.0}),
    "apertus": Tiny("apertus", LLAMA3, unfit=("hidden_act",)),
    "arcee": Tiny("arcee", biased(mlp_bias=True)),
    "bitnet": Tiny("bitnet"),
    "cwm": Tiny("cwm", {**WINDOWS, **LLAMA3}),
    "jais2": Tiny("jais2"),
    "hyperclovax": Tiny("hyperclovax", MULTIPLIERS),
    "granite_swa": Tiny(
        "granite_swa", {**WINDOWS, **MULTIPLIERS}, still=("rope_parameters.rope_theta",)
    ),
    "exaone": Tiny("exaone"),
    "internlm3": Tiny("internlm3", biased(mlp_bias=True)),
    "iquestcoder": Tiny("iquestcoder"),
    "gpt_neox": Tiny("gpt_neox", rope(partial_rotary_factor=0.5)),
    "gpt_neox:sequential": Tiny("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": Tiny("gpt2"),
    "gpt_bigcode": Tiny("gpt_bigcode"),
    "gptj": Tiny("gptj", {"rotary_dim": 8}),
    "gpt_neo": Tiny(
        "gpt_neo",
        {
            "num_layers": 4, "num_heads": 4, "window_size": WINDOW,
            "attention_types": [[["global", "local"], 2]],
        },
    ),
    "codegen": Tiny("codegen", {"rotary_dim": 8}),
    "falcon": Tiny("falcon", {"bias": True}),
    "falcon:new": Tiny("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon:alibi": Tiny(
        "falcon", {"alibi": True, "parallel_attn": False}, still=("rope_parameters.rope_theta",)
    ),
    "persimmon": Tiny("persimmon", rope(partial_rotary_factor=0.5)),
    "mpt": Tiny("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512},
                still=("attn_config.alibi", "attn_config.alibi_bias_max")),
    "bloom": Tiny("bloom", {"n_head": 4}),
    "opt": Tiny("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "diffllama": Tiny("diffllama"),
    "doge": Tiny("doge", still=("norm_topk_prob", "num_experts_per_tok")),
    "lfm3": Tiny(
        "lfm3",
        {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    ),
    "minicpm3": Tiny(
        "minicpm3", {"scale_emb": 3, "scale_depth": 1.0,
                     "dim_model_base": 40}
    ),  # fmt: skip
    "youtu": Tiny("youtu", LATENT),
}

EXPERTS: Mapping[str, Tiny] = {
    "mixtral": Tiny("mixtral", {"sliding_window": None}, published=True),
    "mixtral:window": Tiny("mixtral"),
    "qwen3_moe": Tiny("qwen3_moe", {"mlp_only_layers": [1]}, published=True),
    "qwen3_moe:plain": Tiny("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 2}),
    "qwen2_moe": Tiny("qwen2_moe", {"norm_topk_prob": False}),
    "olmoe": Tiny("olmoe", {"clip_qkv": 1.5, "norm_topk_prob": False}),
    "flex_olmo": Tiny("flex_olmo", still=("norm_topk_prob",)),  # a norm follows the experts
    "gpt_oss": Tiny("gpt_oss", {"num_hidden_layers": 4, "swiglu_limit": 1.5, **YARN}, still=("hidden_act",)),
    "glm4_moe": Tiny("glm4_moe", biased(use_qk_norm=True, **rope(partial_rotary_factor=0.5))),
    "glm4_moe:groups": Tiny("glm4_moe", GROUPS),
    "glm4_moe_lite": Tiny("glm4_moe_lite", {**LATENT, **LATE_EXPERTS}),
    "deepseek_v2": Tiny(
        "deepseek_v2", {**LATENT, "q_lora_rank": None},
        still=("norm_topk_prob",), unfit=("topk_method",),
    ),
    "deepseek_v2:groups": Tiny(
        "deepseek_v2", {**LATENT, **GROUPS, "topk_method": "group_limited_greedy", "num_experts_per_tok": 3},
        still=("norm_topk_prob",),
    ),
    "deepseek_v3": Tiny("deepseek_v3", {**LATENT, **GROUPS}),
    "deepseek_v3:halves": Tiny(
        "deepseek_v3",
        {
            "q_lora_rank": None, "rope_interleave": False,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        },
    ),
    "granitemoe": Tiny("granitemoe", MULTIPLIERS),
    "granitemoeshared": Tiny(
        "granitemoeshared", {"shared_intermediate_size": 80, **MULTIPLIERS}
    ),
    "granitemoe_swa": Tiny(
        "granitemoe_swa",
        {
            **WINDOWS, "shared_intermediate_size": 80,
            **MULTIPLIERS,
        },
        still=("rope_parameters.rope_theta",),
    ),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1}
    ),
    "phimoe": Tiny("phimoe", biased(lm_head_bias=True, sliding_window=None), still=("num_experts_per_tok",)),
    "minimax_m2": Tiny("minimax_m2", rope(partial_rotary_factor=0.5)),
    "hunyuan_v1_moe": Tiny("hunyuan_v1_moe", {"moe_topk": 2}),
    "dots1": Tiny("dots1", {"max_window_layers": 2, **GROUPS}),
    "exaone_moe": Tiny("exaone_moe", {**WINDOWS}),
    "cohere2_moe": Tiny(
        "cohere2_moe",
        {"logit_scale": 0.8, "expert_selection_fn": "sigmoid", **WINDOWS},
        still=("layer_norm_eps", "rope_theta"),
    ),
    "afmoe": Tiny(
        "afmoe", {**WINDOWS, "route_scale": 1.5,
                  "mup_enabled": True}
    ),  # fmt: skip
    "aria_text": Tiny("aria_text", {"moe_topk": 2}),
    "jetmoe": Tiny("jetmoe", {"kv_channels": 16}),
    "llama4_text": Tiny(
        "llama4_text",
        {
            "num_hidden_layers": 4, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32, "floor_scale": 16, "no_rope_layers": [1, 1, 1, 0],
        },
    ),
    "hy_v3": Tiny("hy_v3", {"router_scaling_factor": 1.5}),
    "laguna": Tiny(
        "laguna", {"moe_routed_scaling_factor": 1.5, **two_ropes({"rope_type": "default"})},
        unfit=("moe_apply_router_weight_on_input",),
    ),
    "mellum": Tiny("mellum", two_ropes(STRETCHED)),
    "mimo_v2_flash": Tiny("mimo_v2_flash", unfit=("layer_types",)),
    "minimax_m3_vl_text": Tiny(
        "minimax_m3_vl_text",
        {"dense_intermediate_size": 80, "shared_intermediate_size": 56, "rotary_dim": 16},
        still=(
            "hidden_act", "rotary_dim", "index_block_size", "index_local_blocks",
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
            "head_dim": 16, "num_layers": 2, "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 48, "zero_expert_num": 2, "moe_topk": 3,
        },
    ),
    "dbrx": Tiny(
        "dbrx",
        {
            "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": THETA},
            "ffn_config": {
                "hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2,
            },
        },
        still=("attn_config.rope_theta",),
    ),
}

HYBRIDS: Mapping[str, Tiny] = {
    "qwen3_next": Tiny("qwen3_next", LINEAR),
    "qwen3_5_text": Tiny("qwen3_5_text", LINEAR),
    "qwen3_5_moe_text": Tiny("qwen3_5_moe_text", LINEAR),
    "lfm2": Tiny("lfm2", {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        {
            "num_hidden_layers": 4, "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "bamba": Tiny("bamba", {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **MAMBA}),
    "jamba": Tiny(
        "jamba",
        {
            "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": Tiny(
        "granitemoehybrid",
        {**LINEAR, **MULTIPLIERS, **MAMBA, "shared_intermediate_size": 80,
         "position_embedding_type": "rope"},
    ),  # fmt: skip
    "falcon_h1": Tiny("falcon_h1", {"mamba_d_ssm": 128, "mamba_rms_norm": True, **MAMBA}),
    "nemotron_h": Tiny(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
            "chunk_size": 32, "moe_shared_expert_intermediate_size": 80,
        },
        still=("sliding_window", "time_step_limit"),
    ),
    "olmo_hybrid": Tiny("olmo_hybrid", {**LINEAR, "linear_value_head_dim": 24}),
    "minimax": Tiny("minimax", {**LINEAR, "block_size": 32}),
    "recurrent_gemma": Tiny("recurrent_gemma", {"attention_window_size": WINDOW}),
    "mamba": Tiny("mamba"),
    "mamba2": Tiny(
        "mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16,
                   "chunk_size": 32}
    ),  # fmt: skip
    "falcon_mamba": Tiny("falcon_mamba"),
    "zamba2": Tiny(
        "zamba2",
        {
            "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "use_mem_rope": True, "n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 16, "chunk_size": 32,
        },
    ),
}  # fmt: skip

TINY: Mapping[str, Tiny] = {**DENSE, **EXPERTS, **HYBRIDS}

# What every run of the tests takes; the others are marked `families`.
CORE = frozenset({
    *("llama", "llama:bias", "llama:tied", "llama:llama3", "llama:linear", "llama:yarn"),
    *("mistral", "qwen2", "qwen2:window", "qwen3", "olmo2", "olmo3", "phi3", "phi3:longrope"),
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "cohere2", "starcoder2", "stablelm"),
    *("smollm3", "ernie4_5", "exaone4", "seed_oss", "nemotron", "arcee", "gpt_neox", "phi"),
    *("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "glm4_moe", "deepseek_v2"),
    *("deepseek_v2:groups", "deepseek_v3", "granitemoe", "ernie4_5_moe", "minimax_m2"),
    *("glm4_moe_lite", "qwen3_next", "lfm2"),
})  # fmt: skip
