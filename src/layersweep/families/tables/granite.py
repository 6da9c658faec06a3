"""Granite 3 (IBM, 2024), dense and with experts: multipliers on embeddings, scores, what a half
adds, and logits."""

from __future__ import annotations

from dataclasses import replace

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA, Whole
from layersweep.families.parts import (
    Sizes,
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_top_k,
    repeated,
)
from layersweep.families.spec import Decoder, Feed, Router


def read_granite(f: Fields) -> Decoder:
    feed = Feed(f.count("intermediate_size"), f.activation(), bias=f.flag("mlp_bias"))
    return _read(f, read_sizes(f), feed)


def read_granitemoe(f: Fields) -> Decoder:
    return _read(f, read_sizes(f), _experts(f))


def read_granitemoeshared(f: Fields) -> Decoder:
    shared = f.count_or_zero("shared_intermediate_size")
    return _read(f, read_sizes(f), replace(_experts(f), shared_inner=shared))


def _experts(f: Fields) -> Feed:
    experts, top_k = read_top_k(f, "num_local_experts")
    router = Router(top_k, score="softmax_topk")
    return Feed(f.count("intermediate_size"), f.activation(), experts=experts, router=router)


def _read(f: Fields, sizes: Sizes, feed: Feed) -> Decoder:
    bias, scale = f.flag("attention_bias"), f.number("attention_multiplier")
    attention = grouped(sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias, scale=scale)
    layer = replace(pre_norm(attention, feed, sizes.norm), residual=f.number("residual_multiplier"))
    return assemble(
        f, sizes, repeated(layer, sizes),
        embedding_scale=f.number("embedding_multiplier"),
        logit_scale=1 / f.number("logits_scaling"),
    )  # fmt: skip


MOE = "block_sparse_moe"
NAMES = LLAMA.with_(
    {
        "router": (f"{MOE}.router.layer.weight", f"{MOE}.router.weight"),
        "shared.down_proj": ("shared_mlp.output_linear.weight",),
    },
    Whole(
        "expert", ("gate_proj", "up_proj"),
        (f"{MOE}.input_linear.weight", f"{MOE}.experts.gate_up_proj"),
    ),
    Whole("expert", ("down_proj",), (f"{MOE}.output_linear.weight", f"{MOE}.experts.down_proj")),
    Whole("shared", ("gate_proj", "up_proj"), ("shared_mlp.input_linear.weight",)),
)  # fmt: skip
MULTIPLIERS = dict.fromkeys(
    ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)
DEFAULTS = {"rope_theta": 1e4, "hidden_act": "silu", "rms_norm_eps": 1e-6, **MULTIPLIERS}
EXPERTS = {**DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
GRANITE = Family("granite", "GraniteForCausalLM", read_granite, LLAMA, DEFAULTS)
GRANITE_MOE = Family("granitemoe", "GraniteMoeForCausalLM", read_granitemoe, NAMES, EXPERTS)
GRANITE_MOE_SHARED = Family(
    "granitemoeshared", "GraniteMoeSharedForCausalLM", read_granitemoeshared, NAMES,
    {**EXPERTS, "shared_intermediate_size": 0},
)  # fmt: skip
