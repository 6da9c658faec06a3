"""DeepSeek-V2 (2024, arXiv:2405.04434) and V3 (2024, arXiv:2412.19437): latent attention, first
layers dense, experts in groups, shared ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layersweep.families.family import Family
from layersweep.families.fields import MOST_LAYERS, ROPE_HINT, Fields
from layersweep.families.names import LLAMA
from layersweep.families.parts import Sizes, assemble, mixed, read_sizes, read_top_k
from layersweep.families.spec import Attention, Decoder, Feed, Latent, Norm, Rope, Router

INNER_NORM = Norm(1e-6)  # of latents, whatever rms_norm_eps says


def read_v2(f: Fields) -> Decoder:
    experts, top_k = read_top_k(f, "n_routed_experts")
    method = f.one_of("topk_method", "greedy", "group_limited_greedy")
    groups, best = f.get("n_group"), f.get("topk_group")
    if method == "greedy":
        groups = best = 1
    else:
        groups, best = read_groups(f, experts, top_k, least=1)
    f.one_of("norm_topk_prob", False, None)  # transformers never divides
    router = Router(
        top_k, normalize=False, scale=f.number("routed_scaling_factor"),
        groups=groups, top_groups=best, float32=True,
    )  # fmt: skip
    return _read(f, experts, router, interleaved=True)


def read_v3(f: Fields) -> Decoder:
    return _read(f, *read_v3_router(f), interleaved=f.flag("rope_interleave"))


def read_v3_router(f: Fields) -> tuple[int, Router]:
    """The number of experts, and a router by sigmoids: corrected where experts are chosen, within
    the groups whose two best come to most."""
    experts, top_k = read_top_k(f, "n_routed_experts")
    f.one_of("scoring_func", "sigmoid", None)
    f.one_of("topk_method", "noaux_tc", None)
    groups, best = read_groups(f, experts, top_k, least=2)
    router = Router(
        top_k, score="sigmoid", normalize=f.flag("norm_topk_prob"),
        scale=f.number("routed_scaling_factor"), correction=True,
        groups=groups, top_groups=best, group_score="top2", float32=True,
    )  # fmt: skip
    return experts, router


def read_groups(f: Fields, experts: int, top_k: int, *, least: int) -> tuple[int, int]:
    """Groups of experts, `least` or more in each, and how many of them a token can go to."""
    groups, best = f.count("n_group"), f.count("topk_group")
    if experts % groups or experts // groups < least:
        f.problem("n_group", groups, f"a divisor of {experts} experts, {least} or more in each")
    if not top_k <= best * experts // groups or best > groups:
        f.problem("topk_group", best, f"up to {groups} groups that hold {top_k} experts")
    return groups, best


def read_feeds(f: Fields, dense: Sequence[bool], experts: int, router: Router) -> list[Feed]:
    """Of each layer: `dense`, or experts and a shared one."""
    act, width = f.activation(), f.count("moe_intermediate_size")
    shared = f.count_or_zero("n_shared_experts") * width
    routed = Feed(width, act, experts=experts, router=router, shared_inner=shared)
    plain = Feed(f.count("intermediate_size"), act) if any(dense) else routed
    return [plain if one else routed for one in dense]


def first_dense(f: Fields, sizes: Sizes) -> list[bool]:
    first = f.count_or_zero("first_k_dense_replace")
    return [index < first for index in range(sizes.layers)]


def read_latent(f: Fields, *, interleaved: bool) -> tuple[Sizes, Attention]:
    rope_dim = f.count("qk_rope_head_dim")
    sizes, rope = read_sizes(f, head_dim=rope_dim), f.rope(rope_dim, interleaved=interleaved)
    if sizes.kv_heads != sizes.heads:
        f.problem("num_key_value_heads", sizes.kv_heads, f"{sizes.heads}, as attention heads")
    rank = f.optional_count("q_lora_rank")
    latent = Latent(f.count("kv_lora_rank"), rope_dim, f.count("qk_nope_head_dim"), rank)
    head_dim = latent.nope_dim + rope_dim
    attention = Attention(
        sizes.heads, sizes.heads, head_dim, f.count("v_head_dim"),
        scale=head_dim**-0.5 * _spread(f, rope), rope=rope, latent=latent, norm=INNER_NORM,
    )  # fmt: skip
    return sizes, attention


def _read(f: Fields, experts: int, router: Router, *, interleaved: bool) -> Decoder:
    sizes, attention = read_latent(f, interleaved=interleaved)
    feeds = read_feeds(f, first_dense(f, sizes), experts, router)
    return assemble(f, sizes, mixed(attention, sizes, feeds), draft_layers=draft_layers(f))


def _spread(f: Fields, rope: Rope) -> float:
    """By what YaRN's second mscale multiplies scores, beside what it does to RoPE."""
    if rope.kind not in ("default", "yarn"):
        f.problem("rope_type", rope.kind, '"default" or "yarn"', ROPE_HINT)
    if not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def draft_layers(f: Fields) -> int:
    """Layers for multi-token prediction, which files hold behind the others."""
    name = "num_nextn_predict_layers"
    return f.count(name, MOST_LAYERS) if f.get(name) else 0


ALIASES = {"num_nextn_predict_layers": "num_mtp_layers"}
NAMES = LLAMA.with_(
    {
        "kv_a_proj": ("self_attn.kv_a_proj_with_mqa.weight",),
        "kv_a_norm": ("self_attn.kv_a_layernorm.weight",),
        "q_a_norm": ("self_attn.q_a_layernorm.weight",),
        **{key: (f"self_attn.{key}.weight",) for key in ("kv_b_proj", "q_a_proj", "q_b_proj")},
    }
)
DEFAULTS = {
    "rope_theta": 1e4, "hidden_act": "silu", "rms_norm_eps": 1e-6, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
V2 = Family(
    "deepseek_v2", "DeepseekV2ForCausalLM", read_v2, NAMES,
    {
        **DEFAULTS, "n_routed_experts": 64, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
        "moe_intermediate_size": 1407, "topk_method": "greedy",
    },
    {"n_routed_experts": "num_experts"},
)  # fmt: skip
V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", read_v3, NAMES,
    {
        **DEFAULTS, "num_key_value_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "moe_intermediate_size": 2048,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "rope_interleave": True, "num_nextn_predict_layers": 1,
    },
    {"n_routed_experts": "num_local_experts", **ALIASES},
)  # fmt: skip
