"""What a layer computes, in one short line for people."""

from __future__ import annotations

from layersweep.families.spec import Attention, Feed, Layer, Rope, Router


def describe_layer(layer: Layer, *, foreign: bool = False) -> str:
    """ "GQA 32/4 x 128, q/k norm, RoPE 1000000; 128 experts x 768, 8 per token by softmax".

    `foreign`: modules of transformers compute it, which keep positions and router to themselves.
    """
    feed = layer.feed
    words = f"{feed.experts} experts x {feed.inner}" if foreign and feed.routed else _feed(feed)
    return "; ".join(filter(None, (describe_attention(layer.attention), words)))


def describe_attention(attention: Attention) -> str:
    """Kind, heads and head size, and what is not usual about it."""
    if not attention.num_heads:
        return "no keys or values"
    parts = [_heads(attention)]
    if attention.window is not None:
        parts.append(f"window {attention.window}")
    if attention.softcap is not None:
        parts.append(f"softcap {attention.softcap:g}")
    if attention.sinks:
        parts.append("sinks")
    if attention.qk_norm:
        parts.append("q/k norm" if attention.qk_norm == "head" else "q/k norm over all heads")
    if attention.bias or attention.out_bias:
        parts.append("biases")
    if attention.clip is not None:
        parts.append(f"clipped at {attention.clip:g}")
    if attention.rope:
        width = attention.latent.rope_dim if attention.latent else attention.head_dim
        parts.append(_rope(attention.rope, width))
    return ", ".join(parts)


def _heads(attention: Attention) -> str:
    heads, groups = attention.num_heads, attention.num_kv_heads
    if latent := attention.latent:
        queries = f", queries {latent.query_rank}" if latent.query_rank else ""
        return f"latent {latent.kv_rank} + {latent.rope_dim}{queries}, {heads} x {_size(attention)}"
    if heads == groups:
        return f"MHA {heads} x {_size(attention)}"
    return f"GQA {heads}/{groups} x {_size(attention)}"


def _size(attention: Attention) -> str:
    if attention.head_dim == attention.value_dim:
        return f"{attention.head_dim}"
    return f"{attention.head_dim} (values {attention.value_dim})"


def _rope(rope: Rope, width: int) -> str:
    kind = "" if rope.kind == "default" else f" {rope.kind}"
    factor = f" x {rope.factor:g}" if rope.factor != 1 else ""
    turning = round(rope.dim * rope.turning)
    part = f" on {turning} of {width}" if turning != width else ""
    return f"RoPE {rope.theta:.7g}{kind}{factor}{part}"


def _feed(feed: Feed) -> str:
    if feed.router is None:
        return f"dense {feed.inner}" if feed.inner else ""
    parts = [f"{feed.experts} experts x {feed.inner}, {_router(feed.router)}"]
    if feed.shared_inner:
        gated = "gated " if feed.shared_gate else ""
        parts.append(f"{gated}shared {feed.shared_inner}")
    return ", ".join(parts)


def _router(router: Router) -> str:
    score = "softmax of their logits" if router.score == "softmax_topk" else router.score
    parts = [f"{router.top_k} per token by {score}"]
    if router.correction:
        parts.append("corrected")
    if router.groups > 1:
        parts.append(f"from {router.top_groups} of {router.groups} groups")
    if router.score != "softmax_topk" and not router.normalize:
        parts.append("not renormalized")
    if router.scale != 1:
        parts.append(f"scaled by {router.scale:g}")
    return ", ".join(parts)
