"""SmolLM3 (Hugging Face, 2025): a Llama in which every fourth layer has no positions."""

from __future__ import annotations

from dataclasses import replace

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import (
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_windows,
    windowed,
)
from layersweep.families.spec import Decoder, Feed


def read(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f), f.flag("attention_bias")
    attention = grouped(sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias)
    feed = Feed(f.count("intermediate_size"), f.activation(), bias=f.flag("mlp_bias"))
    every = f.count("no_rope_layer_interval")
    turned = f.integers("no_rope_layers") or [(i + 1) % every for i in range(sizes.layers)]
    if len(turned) != sizes.layers:
        f.problem("no_rope_layers", turned, f"0 or 1 for each of {sizes.layers} layers")
        turned = [1] * sizes.layers
    layers = [
        pre_norm(attention if one else replace(attention, rope=None), feed, sizes.norm)
        for one in turned
    ]
    used = f.flag("use_sliding_window") and f.get("sliding_window") is not None
    windows = read_windows(f, sizes, lambda index: used and not turned[index], used=used)
    return assemble(f, sizes, windowed(layers, windows))


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    read,
    LLAMA,
    {
        "rope_theta": 2e6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
)
