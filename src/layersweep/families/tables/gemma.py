"""Gemma (2024, arXiv:2403.08295), Gemma 2 (2024, arXiv:2408.00118) and the text part of Gemma 3
(2025, arXiv:2503.19786): norms multiply by 1 + weight, embeddings by the root of their width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import (
    Sizes,
    assemble,
    grouped,
    pre_norm,
    read_patterned_windows,
    read_sizes,
    read_two_ropes,
    read_windows,
    repeated,
)
from layersweep.families.spec import Attention, Decoder, Feed, Layer, Rope


def read_gemma(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f, offset=1.0), f.flag("attention_bias")
    attention = grouped(sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias)
    # early files say "gelu" and mean its approximation; some say so in a second field
    act = "gelu_tanh" if f.get("hidden_act") == "gelu" else f.activation()
    f.one_of("hidden_activation", None, "gelu_pytorch_tanh")
    feed = Feed(f.count("intermediate_size"), act)
    layers = repeated(pre_norm(attention, feed, sizes.norm), sizes)
    return assemble(f, sizes, layers, embedding_scale=sizes.hidden**0.5)


def read_gemma2(f: Fields) -> Decoder:
    sizes = read_sizes(f, offset=1.0)
    windows = read_windows(f, sizes, lambda index: index % 2 == 0)
    softcap = f.optional_number("attn_logit_softcapping")
    attention = _attention(f, sizes, f.rope(sizes.head_dim), softcap=softcap)
    return _sandwiched(f, sizes, [replace(attention, window=window) for window in windows])


def read_gemma3(f: Fields) -> Decoder:
    sizes = read_sizes(f, offset=1.0)
    windows = read_patterned_windows(f, sizes)
    full, near = read_two_ropes(f, sizes.head_dim, near_theta="rope_local_base_freq")
    each = [
        _attention(f, sizes, near if window else full, window=window, qk_norm="head")
        for window in windows
    ]
    return _sandwiched(f, sizes, each)


def _attention(f: Fields, sizes: Sizes, rope: Rope, **others: Any) -> Attention:
    bias, scale = f.flag("attention_bias"), f.number("query_pre_attn_scalar") ** -0.5
    return grouped(sizes, rope, bias=bias, out_bias=bias, scale=scale, **others)


def _sandwiched(f: Fields, sizes: Sizes, attentions: list[Attention]) -> Decoder:
    """Norms before and after both halves."""
    feed, norm = Feed(f.count("intermediate_size"), f.activation("hidden_activation")), sizes.norm
    return assemble(
        f, sizes, [Layer(attention, feed, norm, norm, norm, norm) for attention in attentions],
        embedding_scale=sizes.hidden**0.5,
        logit_softcap=f.optional_number("final_logit_softcapping"),
    )  # fmt: skip


NAMES = LLAMA.with_(
    {
        "attention_out_norm": ("post_attention_layernorm.weight",),
        "feed_norm": ("pre_feedforward_layernorm.weight",),
        "feed_out_norm": ("post_feedforward_layernorm.weight",),
    }
)
GELU = "gelu_pytorch_tanh"
DEFAULTS = {
    "rope_theta": 1e4, "rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True,
    "hidden_activation": GELU, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
GEMMA = Family(
    "gemma", "GemmaForCausalLM", read_gemma, LLAMA,
    {**DEFAULTS, "hidden_act": GELU, "num_attention_heads": 16, "num_key_value_heads": 16},
)  # fmt: skip
GEMMA2 = Family(
    "gemma2", "Gemma2ForCausalLM", read_gemma2, NAMES,
    {**DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
)  # fmt: skip
GEMMA3 = Family(
    "gemma3_text", "Gemma3ForCausalLM", read_gemma3, NAMES,
    {
        **DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
        "vocab_size": 262_208, "max_position_embeddings": 131_072,
    },
)  # fmt: skip
