"""ERNIE 4.5 (Baidu, 2025), dense and with experts: pairs of a head's neighbours turn, experts are
chosen by corrected softmax scores."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import (
    assemble,
    grouped,
    mixed,
    pre_norm,
    read_sizes,
    read_top_k,
    repeated,
)
from layersweep.families.spec import Decoder, Feed, Router


def read_dense(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f), f.flag("use_bias")
    rope = f.rope(sizes.head_dim, interleaved=True)
    attention = grouped(sizes, rope, bias=bias, out_bias=bias)
    feed = Feed(f.count("intermediate_size"), f.activation(), bias=bias)
    return assemble(f, sizes, repeated(pre_norm(attention, feed, sizes.norm), sizes))


def read_moe(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    attention = grouped(sizes, f.rope(sizes.head_dim, interleaved=True))
    experts, top_k = read_top_k(f, "moe_num_experts", "moe_k")
    f.one_of("moe_norm_min", NORM_MIN)
    act, width = f.activation(), f.count("moe_intermediate_size")
    routed = Feed(
        width, act, experts=experts, router=Router(top_k, correction=True, float32=True),
        shared_inner=f.count_or_zero("moe_num_shared_experts") * width,
    )  # fmt: skip
    first, step = f.count_or_zero("moe_layer_start_index"), f.count("moe_layer_interval")
    last = f.get("moe_layer_end_index")
    last = sizes.layers - 1 if last == -1 else f.count_or_zero("moe_layer_end_index")
    routes = [first <= i <= last and (i + 1) % step == 0 for i in range(sizes.layers)]
    dense = routed if all(routes) else Feed(f.count("intermediate_size"), act)
    return assemble(f, sizes, mixed(attention, sizes, [routed if one else dense for one in routes]))


NORM_MIN = 1e-12  # least sum that weights of experts are divided by: never reached
DEFAULTS = {
    "rope_theta": 5e5, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
ERNIE = Family(
    "ernie4_5", "Ernie4_5ForCausalLM", read_dense, LLAMA,
    {**DEFAULTS, "num_key_value_heads": 2, "head_dim": 128},
)  # fmt: skip
ERNIE_MOE = Family(
    "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", read_moe,
    LLAMA.with_(
        {
            "router_correction": (
                "mlp.moe_statics.e_score_correction_bias",
                "mlp.gate.moe_statics.e_score_correction_bias",
            )
        }
    ),
    {
        **DEFAULTS, "num_key_value_heads": 4, "moe_num_experts": 64, "moe_k": 6,
        "moe_num_shared_experts": 2, "moe_intermediate_size": 1536, "moe_norm_min": NORM_MIN,
        "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
    },
    {"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"},
)  # fmt: skip
