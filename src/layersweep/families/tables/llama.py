"""Llama (Touvron et al., 2023, arXiv:2302.13971) and the families that differ in a field or two."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA as NAMES
from layersweep.families.parts import (
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_windows,
    repeated,
    windowed,
)
from layersweep.families.spec import Decoder, Feed


def read(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f), f.flag("attention_bias")
    attention = grouped(sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias)
    feed = Feed(f.count("intermediate_size"), f.activation(), bias=f.flag("mlp_bias"))
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


def read_seed_oss(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    attention = grouped(
        sizes, f.rope(sizes.head_dim), bias=f.flag("attention_bias"),
        out_bias=f.flag("attention_out_bias"),
    )  # fmt: skip
    feed = Feed(f.count("intermediate_size"), f.activation(), bias=f.flag("mlp_bias"))
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


def read_mistral(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    attention = grouped(sizes, f.rope(sizes.head_dim), window=f.optional_count("sliding_window"))
    feed = Feed(f.count("intermediate_size"), f.activation())
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


def read_ministral(f: Fields) -> Decoder:
    """Mistral with windows in some of the layers."""
    sizes = read_sizes(f)
    windows = read_windows(f, sizes, lambda _: f.get("sliding_window") is not None)
    feed = Feed(f.count("intermediate_size"), f.activation())
    layer = pre_norm(grouped(sizes, f.rope(sizes.head_dim)), feed, sizes.norm)
    return assemble(f, sizes, windowed(repeated(layer, sizes), windows))


DEFAULTS = {"rope_theta": 1e4, "hidden_act": "silu", "rms_norm_eps": 1e-6}
LLAMA = Family("llama", "LlamaForCausalLM", read, NAMES, DEFAULTS)
WINDOWS = {**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096}
MISTRAL = Family("mistral", "MistralForCausalLM", read_mistral, NAMES, WINDOWS)
MINISTRAL = Family("ministral", "MinistralForCausalLM", read_ministral, NAMES, WINDOWS)
SEED_OSS = Family(
    "seed_oss", "SeedOssForCausalLM", read_seed_oss, NAMES,
    {**DEFAULTS, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
)  # fmt: skip
