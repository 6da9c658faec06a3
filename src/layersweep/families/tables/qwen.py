"""Qwen2 (2024, arXiv:2407.10671) and Qwen3 (2025, arXiv:2505.09388), dense and with experts."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import (
    Sizes,
    assemble,
    grouped,
    mixed,
    pre_norm,
    read_sizes,
    read_top_k,
    read_windows,
    repeated,
    windowed,
)
from layersweep.families.spec import Attention, Decoder, Feed, Router


def read_qwen2(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    return _dense(f, sizes, grouped(sizes, f.rope(sizes.head_dim), bias=True))


def read_qwen3(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f), f.flag("attention_bias")
    rope = f.rope(sizes.head_dim)
    return _dense(f, sizes, grouped(sizes, rope, bias=bias, out_bias=bias, qk_norm="head"))


def read_qwen2_moe(f: Fields) -> Decoder:
    sizes, used = read_sizes(f), _uses_windows(f)
    last = f.count_or_zero("max_window_layers")
    attention = grouped(sizes, f.rope(sizes.head_dim), bias=f.flag("qkv_bias"))
    windows = read_windows(f, sizes, lambda i: used and i % 2 == 0 and i < last, used=used)
    feeds = _feeds(f, sizes, shared_inner=f.count("shared_expert_intermediate_size"))
    return assemble(f, sizes, windowed(mixed(attention, sizes, feeds), windows))


def read_qwen3_moe(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f), f.flag("attention_bias")
    window = f.count("sliding_window") if _uses_windows(f) else None
    attention = grouped(
        sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias, qk_norm="head", window=window
    )
    return assemble(f, sizes, mixed(attention, sizes, _feeds(f, sizes)))


def _dense(f: Fields, sizes: Sizes, attention: Attention) -> Decoder:
    used, first = _uses_windows(f), f.count_or_zero("max_window_layers")
    windows = read_windows(f, sizes, lambda index: used and index >= first, used=used)
    feed = Feed(f.count("intermediate_size"), f.activation())
    layers = repeated(pre_norm(attention, feed, sizes.norm), sizes)
    return assemble(f, sizes, windowed(layers, windows))


def _uses_windows(f: Fields) -> bool:
    return f.flag("use_sliding_window") and f.get("sliding_window") is not None


def _feeds(f: Fields, sizes: Sizes, shared_inner: int = 0) -> list[Feed]:
    """Experts in every `decoder_sparse_step`th layer, but for those of `mlp_only_layers`."""
    experts, top_k = read_top_k(f, "num_experts")
    router, act = Router(top_k, normalize=f.flag("norm_topk_prob")), f.activation()
    step, never = f.count("decoder_sparse_step"), f.integers("mlp_only_layers")
    routed = Feed(
        f.count("moe_intermediate_size"), act, experts=experts, router=router,
        shared_inner=shared_inner, shared_gate=shared_inner > 0,
    )  # fmt: skip
    routes = [index not in never and (index + 1) % step == 0 for index in range(sizes.layers)]
    dense = routed if all(routes) else Feed(f.count("intermediate_size"), act)
    return [routed if one else dense for one in routes]


PLAIN = {"rope_theta": 1e4, "hidden_act": "silu", "rms_norm_eps": 1e-6}
WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}
EXPERTS = {"decoder_sparse_step": 1, "norm_topk_prob": False, "sliding_window": 4096}

QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM", read_qwen2, LLAMA,
    {**PLAIN, **WINDOWS, "num_key_value_heads": 32},
)  # fmt: skip
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", read_qwen3, LLAMA,
    {**PLAIN, **WINDOWS, "num_key_value_heads": 32, "head_dim": 128},
)  # fmt: skip
QWEN2_MOE = Family(
    "qwen2_moe", "Qwen2MoeForCausalLM", read_qwen2_moe, LLAMA,
    {
        **PLAIN, **WINDOWS, **EXPERTS, "num_key_value_heads": 16, "qkv_bias": True,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts": 60, "num_experts_per_tok": 4,
    },
)  # fmt: skip
QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", read_qwen3_moe, LLAMA,
    {
        **PLAIN, **EXPERTS, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8,
    },
    {"num_experts": "num_local_experts"},
)  # fmt: skip
