"""Which weights a decoder has, in which blocks they travel, and their dense shapes.

A block is what moves and is used together. Its weights have canonical names, whatever a file
calls them: `embed`, `layers.0.q_proj`, `layers.0.mlp.gate_proj`, `layers.0.experts.3.down_proj`,
`layers.0.shared.up_proj`, `norm`, `lm_head`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from layersweep.families.spec import Attention, Decoder, Feed, Layer

Role = Literal["embed", "attention", "mlp", "shared", "expert", "head"]
Shape = tuple[int, ...]

# Modules whose matrices decide where a token goes, which are linear layers in some releases of
# transformers and bare parameters in others.
ROUTERS = frozenset({"gate", "router", "wg", "shared_expert_gate", "expert_gate"})


@dataclass(frozen=True)
class BlockShape:
    """`weights`: key within the block -> dense shape, those that are one product side by side.
    `expert` is set where the role is "expert". `float32`: keys that are computed with in float32,
    whatever the others are computed with in. `linear`: keys of linear layers' weights; None where
    these end in "_proj"."""

    role: Role
    layer: int | None
    weights: Mapping[str, Shape]
    expert: int | None = None
    float32: frozenset[str] = frozenset()
    linear: frozenset[str] | None = None

    def packs(self, key: str) -> bool:
        """Whether `--weights nf4` packs a weight: of a linear layer, if that is no router. Routers
        are 0.02 % of a layer and decide where every token goes."""
        return key.endswith("_proj") if self.linear is None else key in self.linear

    @property
    def name(self) -> str:
        """ "embed", "layers.0.attention", "layers.0.experts.3", "head"."""
        if self.layer is None:
            return self.role
        part = f"experts.{self.expert}" if self.role == "expert" else self.role
        return f"layers.{self.layer}.{part}"

    def canonical(self, key: str) -> str:
        """The canonical name of one of its weights."""
        if self.layer is None:
            return key
        return f"layers.{self.layer}.{key}" if self.role == "attention" else f"{self.name}.{key}"

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.weights.values())


def blocks(decoder: Decoder) -> Iterator[BlockShape]:
    """All blocks in sweep order: embedding, layers, head."""
    yield embed_block(decoder)
    for index in range(decoder.num_hidden_layers):
        yield from layer_blocks(decoder, index)
    yield head_block(decoder)


def embed_block(decoder: Decoder) -> BlockShape:
    """Of transformers' decoders, all that computes before the first layer."""
    if decoder.generic:
        return decoder.generic.blocks[0]
    return BlockShape("embed", None, {"embed": (decoder.vocab_size, decoder.hidden_size)})


def head_block(decoder: Decoder) -> BlockShape:
    """Of transformers' decoders, all that computes after the last layer."""
    if decoder.generic:
        return decoder.generic.blocks[-1]
    hidden = decoder.hidden_size
    return BlockShape("head", None, {"norm": (hidden,), "lm_head": (decoder.vocab_size, hidden)})


def layer_blocks(decoder: Decoder, index: int) -> Iterator[BlockShape]:
    """Attention with norms and router; then the dense MLP, or the shared expert and the routed
    ones in order. Of transformers' layers, all but the routed experts is the first block."""
    if decoder.generic:
        yield from (one for one in decoder.generic.blocks if one.layer == index)
        return
    layer, hidden = decoder.layers[index], decoder.hidden_size
    feed = layer.feed
    exact = {"router", "router_correction"} if feed.router and feed.router.float32 else set()
    weights = attention_weights(layer, hidden)
    yield BlockShape("attention", index, weights, float32=frozenset(exact & weights.keys()))
    if not feed.experts:
        yield BlockShape("mlp", index, mlp_weights(feed, feed.inner, hidden))
        return
    if feed.shared_inner:
        shared = dict(mlp_weights(feed, feed.shared_inner, hidden))
        if feed.shared_gate:
            shared["gate"] = (1, hidden)
        yield BlockShape("shared", index, shared)
    routed = mlp_weights(feed, feed.inner, hidden)
    for expert in range(feed.experts):
        yield BlockShape("expert", index, routed, expert)


def attention_weights(layer: Layer, hidden: int) -> dict[str, Shape]:
    """Of a layer's first block. Matrices come first, so that each starts at an even place."""
    one = layer.attention
    found = _latent_weights(one, hidden) if one.latent else _grouped_weights(one, hidden)
    found["o_proj"] = (hidden, one.out_width)
    router = layer.feed.router
    if router is not None:
        found["router"] = (layer.feed.experts, hidden)
    if one.bias:
        found |= {
            "q_bias": (one.query_width,), "k_bias": (one.key_width,), "v_bias": (one.value_width,),
        }  # fmt: skip
    if one.out_bias:
        found["o_bias"] = (hidden,)
    if one.qk_norm:
        whole = one.qk_norm == "all"
        found["q_norm"] = (one.query_width if whole else one.head_dim,)
        found["k_norm"] = (one.key_width if whole else one.head_dim,)
    if one.latent:
        found["kv_a_norm"] = (one.latent.kv_rank,)
        if one.latent.query_rank:
            found["q_a_norm"] = (one.latent.query_rank,)
    if one.sinks:
        found["sinks"] = (one.num_heads,)
    if router is not None and router.bias:
        found["router_bias"] = (layer.feed.experts,)
    if router is not None and router.correction:
        found["router_correction"] = (layer.feed.experts,)
    norms = {
        "attention_norm": layer.attention_norm, "attention_out_norm": layer.attention_out_norm,
        "feed_norm": layer.feed_norm, "feed_out_norm": layer.feed_out_norm,
    }  # fmt: skip
    return found | {key: (hidden,) for key, norm in norms.items() if norm is not None}


def _grouped_weights(one: Attention, hidden: int) -> dict[str, Shape]:
    """Queries, keys and values are one product."""
    return {
        "q_proj": (one.query_width, hidden),
        "k_proj": (one.key_width, hidden),
        "v_proj": (one.value_width, hidden),
    }


def _latent_weights(one: Attention, hidden: int) -> dict[str, Shape]:
    latent = one.latent
    assert latent is not None
    expanded = one.num_heads * (latent.nope_dim + one.value_dim)
    found: dict[str, Shape] = {}
    if latent.query_rank:
        found["q_a_proj"] = (latent.query_rank, hidden)
        found["q_b_proj"] = (one.query_width, latent.query_rank)
    else:
        found["q_proj"] = (one.query_width, hidden)
    found["kv_a_proj"] = (latent.kv_rank + latent.rope_dim, hidden)
    found["kv_b_proj"] = (expanded, latent.kv_rank)
    return found


def mlp_weights(feed: Feed, inner: int, hidden: int) -> dict[str, Shape]:
    """Gate and up are one product; interleaved, they are one matrix in the file, too."""
    if feed.interleaved:
        found: dict[str, Shape] = {"gate_up_proj": (2 * inner, hidden)}
    else:
        found = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    found["down_proj"] = (hidden, inner)
    if feed.bias:
        if feed.interleaved:
            found["gate_up_bias"] = (2 * inner,)
        else:
            found |= {"gate_bias": (inner,), "up_bias": (inner,)}
        found["down_bias"] = (hidden,)
    return found
