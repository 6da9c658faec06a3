"""OLMo 2 (2025, arXiv:2501.00656) and OLMoE (2024, arXiv:2409.02060): queries and keys are normed
over all heads at once."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import (
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_top_k,
    repeated,
)
from layersweep.families.spec import Decoder, Feed, Layer, Router


def read_olmo2(f: Fields) -> Decoder:
    """Norms come after both halves of a layer, none before."""
    sizes, bias = read_sizes(f), f.flag("attention_bias")
    attention = grouped(sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias, qk_norm="all")
    feed = Feed(f.count("intermediate_size"), f.activation())
    layer = Layer(
        attention, feed, attention_norm=None, feed_norm=None,
        attention_out_norm=sizes.norm, feed_out_norm=sizes.norm,
    )  # fmt: skip
    return assemble(f, sizes, repeated(layer, sizes))


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
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    read_olmo2,
    LLAMA.with_(
        {
            "attention_out_norm": ("post_attention_layernorm.weight",),
            "feed_out_norm": ("post_feedforward_layernorm.weight",),
        }
    ),
    DEFAULTS,
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    read_olmoe,
    LLAMA,
    {**DEFAULTS, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    {"num_experts": "num_local_experts"},
)
