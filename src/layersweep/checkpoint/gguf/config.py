"""GGUF's metadata as the config.json that the model was published with, family by family.

Families then read it like any other. What metadata leave out is what llama.cpp computes with where
they do: windows of Gemma and gpt-oss, for example, come by the layer's number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layersweep.checkpoint.gguf.metadata import ARCHITECTURE, Metadata

Config = dict[str, Any]

GEMMA2_27B, GEMMA3_27B = 46, 62  # layers; these scale attention by the width of all heads
WINDOW_THETA = 10_000.0  # of Gemma 3's layers with windows, where the file says nothing
SOFTMAX, SIGMOID = 1, 2  # how experts are scored
FREQUENCIES = "rope_freqs.weight"  # what RoPE's frequencies are divided by


def config_of(meta: Metadata) -> Config:
    """The fields of config.json; what is wrong is in `meta.problems`."""
    read = ARCHITECTURES.get(meta.architecture)
    if read is None:
        needed = f"one of {', '.join(ARCHITECTURES)}"
        hint = "convert the model to safetensors in its original layout, which has more families"
        meta.problem(ARCHITECTURE, meta.architecture, needed, hint)
        return {}
    found = read(meta)
    meta.check_unread()
    return found


def _common(meta: Metadata, model_type: str) -> Config:
    """What all with the usual attention have in common."""
    sizes = _sizes(meta)
    heads = sizes["num_attention_heads"]
    size = meta.count("attention.key_length", max(1, sizes["hidden_size"] // heads))
    meta.only("attention.value_length", size)
    meta.only("rope.dimension_count", size)
    return sizes | {
        "model_type": model_type,
        "num_key_value_heads": meta.count("attention.head_count_kv", heads),
        "head_dim": size,
    }


def _sizes(meta: Metadata) -> Config:
    """Those that no kind of attention has of its own. `vocab_size` is the number of rows of the
    embedding."""
    embedding = meta.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else 1
    meta.only("vocab_size", rows)
    meta.only("attention.causal", True)
    return {
        "vocab_size": rows,
        "hidden_size": meta.count("embedding_length"),
        "num_hidden_layers": meta.count("block_count"),
        "num_attention_heads": meta.count("attention.head_count"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.count("context_length"),
        "tie_word_embeddings": not meta.has("output.weight"),
        "bos_token_id": meta.token("bos_token_id"),
        "eos_token_id": meta.token("eos_token_id"),
    }


def _rope(meta: Metadata, theta: float | None = None) -> Config:
    """Theta and scaling. A scale of 1 is none."""
    found: Config = {"rope_theta": meta.number("rope.freq_base", theta or 10_000.0)}
    kind = meta.get("rope.scaling.type")
    factor = meta.optional_number("rope.scaling.factor")
    older = meta.optional_number("rope.scale_linear")
    length = meta.optional_count("rope.scaling.original_context_length")
    meta.get("rope.scaling.finetuned")  # says how the model was trained
    if kind is None and older is not None:
        kind, factor = "linear", older
    if kind in (None, "none") or (kind == "linear" and factor in (None, 1.0)):
        return found
    scaling: Config = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = length
        scaling |= {
            name: meta.number(f"rope.scaling.yarn_{name}")
            for name in ("beta_fast", "beta_slow")
            if meta.get(f"rope.scaling.yarn_{name}") is not None
        }
        meta.only("rope.scaling.attn_factor", 1.0)
        meta.only("rope.scaling.yarn_attn_factor", 1.0)
        meta.only("rope.scaling.yarn_ext_factor", 1.0)
        spread = meta.optional_number("rope.scaling.yarn_log_multiplier")
        if spread is not None:  # a tenth of DeepSeek's mscale, which is that of all dimensions too
            scaling |= {"mscale": 10 * spread, "mscale_all_dim": 10 * spread}
    elif kind != "linear":
        meta.problem(f"{meta.architecture}.rope.scaling.type", kind, "none, linear or yarn")
    return found | {"rope_scaling": scaling}


def _llama(meta: Metadata) -> Config:
    """Llama, and Mixtral, which is a Llama with experts to llama.cpp."""
    experts = meta.optional_count("expert_count")
    found = _common(meta, "mixtral" if experts else "llama") | _rope(meta)
    found |= {"intermediate_size": meta.count("feed_forward_length"), "hidden_act": "silu"}
    meta.only("expert_feed_forward_length", found["intermediate_size"])
    used = meta.optional_count("expert_used_count")
    if experts:
        return found | {"num_local_experts": experts, "num_experts_per_tok": used}
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return found | {name: meta.has(tensor) for name, tensor in biases.items()}


def _qwen2(meta: Metadata) -> Config:
    found = _common(meta, "qwen2") | _rope(meta)
    return found | {
        "intermediate_size": meta.count("feed_forward_length"), "use_sliding_window": False,
    }  # fmt: skip


def _qwen3(meta: Metadata) -> Config:
    return _qwen2(meta) | {"model_type": "qwen3", "attention_bias": False}


def _qwen3_moe(meta: Metadata) -> Config:
    found = _common(meta, "qwen3_moe") | _rope(meta)
    meta.get("feed_forward_length")  # of dense layers, which there are none of
    return found | {
        "moe_intermediate_size": meta.count("expert_feed_forward_length"),
        "num_experts": meta.count("expert_count"),
        "num_experts_per_tok": meta.count("expert_used_count"),
        "norm_topk_prob": True, "attention_bias": False, "use_sliding_window": False,
    }  # fmt: skip


def _gemma(meta: Metadata, model_type: str, largest: int) -> Config:
    found = _common(meta, model_type)
    own = found["head_dim"]
    if found["num_hidden_layers"] == largest:
        own = found["hidden_size"] // found["num_attention_heads"]
    return found | {
        "intermediate_size": meta.count("feed_forward_length"),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": own,
    }


def _gemma2(meta: Metadata) -> Config:
    """What early files leave out is as Gemma 2 was published."""
    meta.only("attention.sliding_window_pattern", 2)
    return {
        **_gemma(meta, "gemma2", GEMMA2_27B),
        **_rope(meta),
        "sliding_window": meta.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": meta.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.number("final_logit_softcapping", 30.0),
    }


def _gemma3(meta: Metadata) -> Config:
    return {
        **_gemma(meta, "gemma3_text", GEMMA3_27B),
        **_rope(meta, 1e6),
        "sliding_window": meta.count("attention.sliding_window"),
        "final_logit_softcapping": meta.optional_number("final_logit_softcapping"),
        "rope_local_base_freq": meta.number("rope.freq_base_swa", WINDOW_THETA),
        "sliding_window_pattern": meta.count("attention.sliding_window_pattern", 6),
    }


def _gpt_oss(meta: Metadata) -> Config:
    found = _common(meta, "gpt_oss") | _rope(meta, 150_000.0)
    if "rope_scaling" in found:
        found["rope_scaling"] |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    meta.get("feed_forward_length")  # as wide as an expert
    meta.only("attention.sliding_window_pattern", 2)
    return found | {
        "rope_parameters": None,
        "intermediate_size": meta.count("expert_feed_forward_length"),
        "sliding_window": meta.count("attention.sliding_window"),
        "num_local_experts": meta.count("expert_count"),
        "num_experts_per_tok": meta.count("expert_used_count"),
        "attention_bias": True,
    }


def _deepseek2(meta: Metadata) -> Config:
    """DeepSeek-V2 and V3, which differ in how their routers score."""
    third = meta.get("expert_gating_func") == SIGMOID
    meta.only("expert_gating_func", SOFTMAX, SIGMOID)
    rope_dim = meta.count("rope.dimension_count")
    groups = meta.count("expert_group_count", 1)
    # later converters say what a head has apart from what a cache keeps of a token
    key, value = (
        meta.count(f"attention.{part}_length_mla", meta.count(f"attention.{part}_length"))
        for part in ("key", "value")
    )
    heads = meta.count("attention.head_count")
    meta.only("attention.head_count_kv", 1, heads)
    meta.only("nextn_predict_layers", 0)
    found: Config = {
        "model_type": "deepseek_v3" if third else "deepseek_v2",
        **_sizes(meta),
        **_rope(meta),
        "num_key_value_heads": heads,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key - rope_dim,
        "v_head_dim": value,
        "kv_lora_rank": meta.count("attention.kv_lora_rank"),
        "q_lora_rank": meta.optional_count("attention.q_lora_rank"),
        "intermediate_size": meta.count("feed_forward_length"),
        "moe_intermediate_size": meta.count("expert_feed_forward_length"),
        "n_routed_experts": meta.count("expert_count"),
        "num_experts_per_tok": meta.count("expert_used_count"),
        "n_shared_experts": meta.optional_count("expert_shared_count"),
        "first_k_dense_replace": meta.optional_count("leading_dense_block_count"),
        "routed_scaling_factor": meta.number("expert_weights_scale", 1.0),
        "norm_topk_prob": meta.flag("expert_weights_norm"),
        "n_group": groups,
        "topk_group": meta.count("expert_group_used_count", 1),
    }
    if third:
        return found | {"num_nextn_predict_layers": 0}
    return found | {"topk_method": "greedy" if groups == 1 else "group_limited_greedy"}


ARCHITECTURES: dict[str, Callable[[Metadata], Config]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2, "gemma3": _gemma3, "gpt-oss": _gpt_oss, "deepseek2": _deepseek2,
}  # fmt: skip
