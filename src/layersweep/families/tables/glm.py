"""GLM-4.5 (2025, arXiv:2508.06471): experts by sigmoid, a shared one, first layers dense; half of
each head turns. GLM-4 before it is dense, with norms on both sides of its halves."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA, Whole
from layersweep.families.parts import (
    Sizes,
    assemble,
    grouped,
    mixed,
    pre_norm,
    read_sizes,
    repeated,
)
from layersweep.families.spec import Attention, Decoder, Feed, Layer
from layersweep.families.tables.deepseek import (
    ALIASES,
    draft_layers,
    first_dense,
    read_feeds,
    read_latent,
    read_v3_router,
)
from layersweep.families.tables.deepseek import (
    DEFAULTS as LATENT,
)
from layersweep.families.tables.deepseek import (
    NAMES as LATENT_NAMES,
)


def read_glm(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    layer = pre_norm(_turned_in_pairs(f, sizes), _feed(f), sizes.norm)
    return assemble(f, sizes, repeated(layer, sizes))


def read_glm4(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    norm = sizes.norm
    layer = Layer(_turned_in_pairs(f, sizes), _feed(f), norm, norm, norm, norm)
    return assemble(f, sizes, repeated(layer, sizes))


def read_glm4_moe(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    attention = grouped(
        sizes, f.rope(sizes.head_dim, partial=0.5), bias=f.flag("attention_bias"),
        qk_norm="head" if f.flag("use_qk_norm") else None,
    )  # fmt: skip
    feeds = read_feeds(f, first_dense(f, sizes), *read_v3_router(f))
    return assemble(f, sizes, mixed(attention, sizes, feeds), draft_layers=draft_layers(f))


def read_glm4_moe_lite(f: Fields) -> Decoder:
    """DeepSeek-V3's attention and experts; which layers are dense stands in a list."""
    sizes, attention = read_latent(f, interleaved=f.flag("rope_interleave"))
    kinds = f.each_layer("mlp_layer_types", sizes.layers, "dense", "sparse")
    dense = [kind == "dense" for kind in kinds or ["dense"] + ["sparse"] * (sizes.layers - 1)]
    f.one_of("first_k_dense_replace", None, sum(dense))
    feeds = read_feeds(f, dense, *read_v3_router(f))
    return assemble(f, sizes, mixed(attention, sizes, feeds), draft_layers=draft_layers(f))


def _turned_in_pairs(f: Fields, sizes: Sizes) -> Attention:
    rope = f.rope(sizes.head_dim, partial=0.5, interleaved=True)
    return grouped(sizes, rope, bias=f.flag("attention_bias"))


def _feed(f: Fields) -> Feed:
    return Feed(f.count("intermediate_size"), f.activation())


DEFAULTS = {"rope_theta": 1e4, "hidden_act": "silu"}
GATE_AND_UP = Whole("mlp", ("gate_proj", "up_proj"), ("mlp.gate_up_proj.weight",))
DENSE = {
    **DEFAULTS, "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}  # fmt: skip
GLM = Family("glm", "GlmForCausalLM", read_glm, LLAMA.with_({}, GATE_AND_UP), DENSE)
GLM4 = Family(
    "glm4", "Glm4ForCausalLM", read_glm4,
    LLAMA.with_(
        {
            "attention_out_norm": ("post_self_attn_layernorm.weight",),
            "feed_out_norm": ("post_mlp_layernorm.weight",),
        },
        GATE_AND_UP,
    ),
    DENSE,
)  # fmt: skip
EXPERTS = {
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "rms_norm_eps": 1e-5,
}  # fmt: skip
GLM4_MOE = Family(
    "glm4_moe", "Glm4MoeForCausalLM", read_glm4_moe, LLAMA,
    {
        **DEFAULTS, **EXPERTS, "num_key_value_heads": 8, "n_routed_experts": 128,
        "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
    {"n_routed_experts": "num_local_experts", **ALIASES},
)  # fmt: skip
GLM4_MOE_LITE = Family(
    "glm4_moe_lite", "Glm4MoeLiteForCausalLM", read_glm4_moe_lite, LATENT_NAMES,
    {
        **LATENT, **EXPERTS, "num_key_value_heads": 20, "n_routed_experts": 64,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "routed_scaling_factor": 1.8,
        "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "rope_interleave": True,
    },
    {"n_routed_experts": "num_local_experts"},
)  # fmt: skip
