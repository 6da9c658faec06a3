"""MiniMax-M2 (2025): a Mixtral that routes by corrected sigmoids, norms queries and keys over all
heads, and turns half of each."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.parts import (
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_top_k,
    repeated,
)
from layersweep.families.spec import Decoder, Feed, Router
from layersweep.families.tables.mixtral import MIXTRAL


def read(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    turned = f.optional_count("rotary_dim") or sizes.head_dim
    rope = f.rope(sizes.head_dim, partial=turned / sizes.head_dim)
    f.one_of("use_qk_norm", True, None)
    f.one_of("scoring_func", "sigmoid", None)
    experts, top_k = read_top_k(f, "num_local_experts")
    feed = Feed(
        f.count("intermediate_size"), f.activation(), experts=experts,
        router=Router(top_k, score="sigmoid", correction=True),
    )  # fmt: skip
    layer = pre_norm(grouped(sizes, rope, qk_norm="all"), feed, sizes.norm)
    return assemble(f, sizes, repeated(layer, sizes))


MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    read,
    MIXTRAL.names.with_(
        {
            "router_correction": (
                "block_sparse_moe.e_score_correction_bias",
                "mlp.e_score_correction_bias",
            )
        }
    ),
    {
        "rope_theta": 5e6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    {"num_local_experts": "num_experts"},
)
