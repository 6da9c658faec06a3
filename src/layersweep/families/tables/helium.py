"""Helium 1 (Kyutai, 2025): a Llama whose heads turn in neighbouring pairs."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import assemble, grouped, pre_norm, read_sizes, repeated
from layersweep.families.spec import Decoder, Feed


def read(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    rope = f.rope(sizes.head_dim, interleaved=True)
    attention = grouped(sizes, rope, bias=f.flag("attention_bias"))
    feed = Feed(f.count("intermediate_size"), f.activation(), bias=f.flag("mlp_bias"))
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


HELIUM = Family(
    "helium",
    "HeliumForCausalLM",
    read,
    LLAMA,
    {
        "rope_theta": 1e5,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-8,
        "head_dim": 128,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
    },
)
