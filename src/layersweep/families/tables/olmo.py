"""OLMo 2 (2025, arXiv:2501.00656), OLMo 3 (2025) and OLMoE (2024, arXiv:2409.02060): queries and
keys are normed over all heads at once."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import (
    Sizes,
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_top_k,
    read_two_ropes,
    read_windows,
    repeated,
    windowed,
)
from layersweep.families.spec import Decoder, Feed, Layer, Rope, Router


def read_olmo2(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    return assemble(f, sizes, repeated(_post_norm(f, sizes, f.rope(sizes.head_dim)), sizes))


def read_olmo3(f: Fields) -> Decoder:
    """Windows in three of four layers, with a RoPE that is not stretched."""
    sizes = read_sizes(f)
    windows = read_windows(f, sizes, lambda index: (index + 1) % 4 > 0)
    full, near = read_two_ropes(f, sizes.head_dim)
    layers = [_post_norm(f, sizes, near if window else full) for window in windows]
    return assemble(f, sizes, windowed(layers, windows))


def _post_norm(f: Fields, sizes: Sizes, rope: Rope) -> Layer:
    """Norms come after both halves, none before."""
    bias = f.flag("attention_bias")
    attention = grouped(sizes, rope, bias=bias, out_bias=bias, qk_norm="all")
    feed = Feed(f.count("intermediate_size"), f.activation())
    return Layer(attention, feed, None, None, sizes.norm, sizes.norm)


def read_olmoe(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f), f.flag("attention_bias")
    attention = grouped(
        sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias, qk_norm="all",
        clip=f.optional_number("clip_qkv"),
    )  # fmt: skip
    experts, top_k = read_top_k(f, "num_experts")
    router = Router(top_k, normalize=f.flag("norm_topk_prob"))
    feed = Feed(f.count("intermediate_size"), f.activation(), experts=experts, router=router)
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


DEFAULTS = {"rope_theta": 1e4, "hidden_act": "silu", "rms_norm_eps": 1e-5}
POST_NORM = LLAMA.with_(
    {
        "attention_out_norm": ("post_attention_layernorm.weight",),
        "feed_out_norm": ("post_feedforward_layernorm.weight",),
    }
)
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", read_olmo2, POST_NORM, DEFAULTS)
OLMO3 = Family(
    "olmo3", "Olmo3ForCausalLM", read_olmo3, POST_NORM,
    {**DEFAULTS, "rope_theta": 5e5, "sliding_window": 4096},
)  # fmt: skip
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    read_olmoe,
    LLAMA,
    {**DEFAULTS, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    {"num_experts": "num_local_experts"},
)
