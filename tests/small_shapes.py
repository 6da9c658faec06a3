"""Published shapes with so few numbers that a study of them takes half a second."""

from __future__ import annotations

from layersweep.checkpoint.synth_shapes import SHAPES, PublishedShape

SMALL = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEWER: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {},
    "qwen3-30b-a3b": {"num_experts": 16, "moe_intermediate_size": 32},
    "gpt-oss-20b": {"num_local_experts": 8, "sliding_window": 32},
    "glm-4.5-air": {"n_routed_experts": 16, "moe_intermediate_size": 32},
    "deepseek-v2-lite": {
        "n_routed_experts": 16, "moe_intermediate_size": 32, "num_key_value_heads": 4,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    },
}  # fmt: skip


def small_shape(name: str) -> PublishedShape:
    return SHAPES[name].with_fields({**SMALL, **FEWER[name]})
