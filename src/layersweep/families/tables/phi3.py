"""Phi-3 (2024, arXiv:2404.14219): queries, keys and values are one matrix, gate and up another."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import ROPE_HINT, Fields
from layersweep.families.names import LLAMA, Whole
from layersweep.families.parts import assemble, grouped, pre_norm, read_sizes, repeated
from layersweep.families.spec import Decoder, Feed


def read(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    rope = f.rope(sizes.head_dim, partial=1.0)
    if rope.kind not in ("default", "longrope"):
        f.problem("rope_type", rope.kind, '"default" or "longrope"', ROPE_HINT)
    attention = grouped(sizes, rope, window=f.optional_count("sliding_window"))
    feed = Feed(f.count("intermediate_size"), f.activation())
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    read,
    LLAMA.with_(
        {},
        Whole("attention", ("q_proj", "k_proj", "v_proj"), ("self_attn.qkv_proj.weight",)),
        Whole("mlp", ("gate_proj", "up_proj"), ("mlp.gate_up_proj.weight",)),
    ),
    {
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
    },
)
