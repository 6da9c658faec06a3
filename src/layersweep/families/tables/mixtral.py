"""Mixtral (Jiang et al., 2024, arXiv:2401.04088)."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA, MOE_FOLDERS, Whole
from layersweep.families.parts import (
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_top_k,
    repeated,
)
from layersweep.families.spec import Decoder, Feed, Router


def read(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    experts, top_k = read_top_k(f, "num_local_experts")
    attention = grouped(sizes, f.rope(sizes.head_dim), window=f.optional_count("sliding_window"))
    feed = Feed(f.count("intermediate_size"), f.activation(), experts=experts, router=Router(top_k))
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


def _expert(*parts: str) -> tuple[str, ...]:
    """Published as w1, w2 and w3; other writers use the names of transformers' dense MLPs."""
    return tuple(
        f"{folder}.experts.{{expert}}.{part}.weight" for folder in MOE_FOLDERS[::-1]
        for part in parts
    )  # fmt: skip


def _whole(keys: tuple[str, ...], tensor: str) -> Whole:
    names = (f"{folder}.experts.{tensor}" for folder in MOE_FOLDERS[::-1])
    return Whole("expert", keys, tuple(end for name in names for end in (name, f"{name}.weight")))


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    read,
    LLAMA.with_(
        {
            "router": tuple(f"{folder}.gate.weight" for folder in MOE_FOLDERS[::-1]),
            "experts.gate_proj": _expert("w1", "gate_proj"),
            "experts.up_proj": _expert("w3", "up_proj"),
            "experts.down_proj": _expert("w2", "down_proj"),
        },
        _whole(("gate_proj", "up_proj"), "gate_up_proj"),
        _whole(("down_proj",), "down_proj"),
    ),
    defaults={
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    aliases={"num_local_experts": "num_experts"},
)
