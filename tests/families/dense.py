"""Decoders without experts."""

from __future__ import annotations

from collections.abc import Mapping

from families.parts import (
    LATENT,
    LLAMA3,
    MULTIPLIERS,
    STRETCHED,
    WINDOWS,
    YARN,
    biased,
    long_rope,
    rope,
    two_ropes,
)
from families.small import WINDOW, Tiny

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
    "olmo2": Tiny("olmo2", published=True),
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
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 6.0,
        },
        published=True,
    ),
    "gemma3_text": Tiny(
        "gemma3_text",
        {"query_pre_attn_scalar": 20, **two_ropes({"rope_type": "linear", "factor": 2.0})},
    ),
    "gemma3_text:published": Tiny(
        "gemma3_text",
        {"query_pre_attn_scalar": 20, **two_ropes({"rope_type": "linear", "factor": 2.0})},
        published=True,
    ),
    "vaultgemma": Tiny(
        "vaultgemma",
        {
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "glm": Tiny("glm", rope(partial_rotary_factor=0.5)),
    "glm4": Tiny("glm4", rope(partial_rotary_factor=0.5), published=True),
    "granite": Tiny("granite", biased(mlp_bias=True, **MULTIPLIERS), published=True),
    "cohere": Tiny("cohere", {"logit_scale": 0.8, "use_qk_norm": True}),
    "cohere2": Tiny("cohere2", {"logit_scale": 0.8, **WINDOWS}),
    "starcoder2": Tiny("starcoder2"),
    "stablelm": Tiny(
        "stablelm",
        {"use_qkv_bias": True, "qk_layernorm": True, **rope(partial_rotary_factor=0.25)},
        unfit=("use_parallel_residual",),
    ),
    "smollm3": Tiny(
        "smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "sliding_window": None}
    ),
    "ernie4_5": Tiny("ernie4_5", {"use_bias": True}),
    "exaone4": Tiny("exaone4", {**WINDOWS}),
    "seed_oss": Tiny("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "helium": Tiny("helium", {"head_dim": 16}),
    "nemotron": Tiny("nemotron", biased(mlp_bias=True, **rope(partial_rotary_factor=0.5))),
    "hunyuan_v1_dense": Tiny("hunyuan_v1_dense"),
    "nanochat": Tiny("nanochat", {"final_logit_softcapping": 6.0}),
    "apertus": Tiny("apertus", LLAMA3, still=("act_fn.eps",), unfit=("hidden_act",)),
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
            "num_layers": 4,
            "num_heads": 4,
            "window_size": WINDOW,
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
    "mpt": Tiny(
        "mpt",
        {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512},
        still=("attn_config.alibi", "attn_config.alibi_bias_max"),
    ),
    "bloom": Tiny("bloom", {"n_head": 4}),
    "opt": Tiny(
        "opt",
        {"ffn_dim": 96, "word_embed_proj_dim": 64},
        still=("k_proj.bias",),  # no RoPE: it adds the same to all scores
    ),
    "diffllama": Tiny("diffllama"),
    "doge": Tiny("doge", still=("norm_topk_prob", "num_experts_per_tok")),
    "lfm3": Tiny(
        "lfm3",
        {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    ),
    "minicpm3": Tiny("minicpm3", {"scale_emb": 3, "scale_depth": 1.0, "dim_model_base": 40}),
    "youtu": Tiny("youtu", LATENT),
    "gemma3n_text": Tiny(
        "gemma3n_text",
        {
            **WINDOWS,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma4_unified_text": Tiny("gemma4_unified_text", WINDOWS, unfit=("layer_types",)),
    "apertus1p5_text": Tiny(
        "apertus1p5_text", LLAMA3, still=("act_fn.eps",), unfit=("hidden_act",)
    ),
    "gpt_neox_japanese": Tiny("gpt_neox_japanese"),
    "openai-gpt": Tiny("openai-gpt"),
    "biogpt": Tiny("biogpt", still=("layer_norm_eps", "k_proj.bias")),
    "xglm": Tiny(
        "xglm",
        {"d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4},
        still=("k_proj.bias",),
    ),
}
