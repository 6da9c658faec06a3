"""Tiny random models of transformers, one for each kind of layer that a cache can meet."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 8
_COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 256,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "decoder_sparse_step": 1}  # fmt: skip
_MLA = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8,
        "v_head_dim": 24, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "sliding_window_pattern": 2,
                    "query_pre_attn_scalar": 16},
    "gpt_oss": {"sliding_window": WINDOW, **_MOE},
    "qwen3_next": {"full_attention_interval": 2, "linear_key_head_dim": 16,
                   "linear_value_head_dim": 16, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "shared_expert_intermediate_size": 32,
                   "partial_rotary_factor": 0.5, **_MOE},
    "glm4": {"partial_rotary_factor": 0.5},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
}  # fmt: skip


@cache
def cached_model(kind: str) -> Any:
    """Random, float32, with attention that has its preferences. Do not change it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_COMMON, **FIELDS[kind]})
    config._attn_implementation = "eager" if kind == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
            elif "bias" in name or "sinks" in name:
                weight.normal_(0, 0.5)
    return model
