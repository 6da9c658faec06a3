"""gpt-oss (2025, arXiv:2508.10925): windows in every other layer, attention sinks, a router over
the logits of the chosen experts alone, and experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.names import LLAMA, Whole
from layersweep.families.parts import (
    assemble,
    grouped,
    pre_norm,
    read_sizes,
    read_top_k,
    read_windows,
    repeated,
    windowed,
)
from layersweep.families.spec import Decoder, Feed, Router


def read(f: Fields) -> Decoder:
    sizes, bias = read_sizes(f), f.flag("attention_bias")
    windows = read_windows(f, sizes, lambda index: index % 2 == 0)
    attention = grouped(sizes, f.rope(sizes.head_dim), bias=bias, out_bias=bias, sinks=True)
    experts, top_k = read_top_k(f, "num_local_experts")
    f.one_of("swiglu_alpha", SLOPE)
    feed = Feed(
        f.count("intermediate_size"), "swiglu_clamped", bias=True, interleaved=True,
        limit=f.number("swiglu_limit"), experts=experts,
        router=Router(top_k, score="softmax_topk", bias=True),
    )  # fmt: skip
    layers = repeated(pre_norm(attention, feed, sizes.norm), sizes)
    return assemble(f, sizes, windowed(layers, windows))


SLOPE = 1.702  # of the gate's sigmoid
EXPERTS = "mlp.experts"
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    read,
    LLAMA.with_(
        {
            "router": ("mlp.router.weight", "mlp.router.linear.weight"),
            "router_bias": ("mlp.router.bias", "mlp.router.linear.bias"),
            # a linear layer of each expert, as the published 4-bit files have them
            **{
                f"experts.{key}_{part}": (f"{EXPERTS}.{key}_projs.{{expert}}.{end}",)
                for key in ("gate_up", "down")
                for part, end in (("proj", "weight"), ("bias", "bias"))
            },
        },
        # all experts of a layer in one tensor, in 4 bits as published
        Whole("expert", ("gate_up_proj",), (f"{EXPERTS}.gate_up_proj_blocks",)),
        Whole("expert", ("down_proj",), (f"{EXPERTS}.down_proj_blocks",)),
        # or as transformers has them in memory, matrices transposed: gate and up take turns
        Whole("expert", ("gate_up_proj",), (f"{EXPERTS}.gate_up_proj",), transposed=True),
        Whole("expert", ("down_proj",), (f"{EXPERTS}.down_proj",), transposed=True),
        Whole("expert", ("gate_up_bias",), (f"{EXPERTS}.gate_up_proj_bias",)),
        Whole("expert", ("down_bias",), (f"{EXPERTS}.down_proj_bias",)),
    ),
    {
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-5, "head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "attention_bias": True, "swiglu_alpha": SLOPE, "swiglu_limit": 7.0,
        "num_local_experts": 128, "num_experts_per_tok": 4, "max_position_embeddings": 131_072,
    },
)  # fmt: skip
