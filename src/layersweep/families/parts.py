"""Pieces that the families' tables are made of, as most configs say them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layersweep.families.fields import MOST_EXPERTS, MOST_LAYERS, Fields
from layersweep.families.spec import Attention, Decoder, Feed, Layer, Norm, Rope


@dataclass(frozen=True)
class Sizes:
    """Those that every config has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: Norm


def read_sizes(f: Fields, *, offset: float = 0.0) -> Sizes:
    """`offset`: of the norms' weights."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    shared = f.get("num_key_value_heads")
    kv_heads = heads if shared is None else f.count("num_key_value_heads")
    if heads % kv_heads:
        f.problem("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    return Sizes(
        hidden, f.count("num_hidden_layers", MOST_LAYERS), heads, kv_heads,
        f.head_dim(hidden, heads), Norm(f.number("rms_norm_eps"), offset),
    )  # fmt: skip


def grouped(sizes: Sizes, rope: Rope | None, **others: Any) -> Attention:
    """Grouped-query attention with the usual scale; `others`: fields of Attention."""
    given = {
        "num_heads": sizes.heads, "num_kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim,
        "value_dim": sizes.head_dim, "scale": sizes.head_dim**-0.5, "rope": rope,
    }  # fmt: skip
    return Attention(**{**given, **others})


def pre_norm(attention: Attention, feed: Feed, norm: Norm) -> Layer:
    """A layer whose norms come before its halves."""
    return Layer(attention, feed, norm, norm)


def repeated(layer: Layer, sizes: Sizes) -> tuple[Layer, ...]:
    """The same layer everywhere."""
    return (layer,) * sizes.layers


def assemble(f: Fields, sizes: Sizes, layers: Sequence[Layer], **others: Any) -> Decoder:
    """The decoder of these layers; `others`: fields of Decoder that the family sets."""
    decoder = Decoder(
        architecture="", model_type="",
        vocab_size=f.count("vocab_size"),
        hidden_size=sizes.hidden,
        layers=tuple(layers),
        norm=sizes.norm,
        max_position_embeddings=f.count("max_position_embeddings"),
        tie_word_embeddings=f.flag("tie_word_embeddings"),
        bos_token_id=f.token("bos_token_id"),
        eos_token_id=f.token("eos_token_id"),
        synthetic=f.flag("layersweep_synthetic"),
        **others,
    )  # fmt: skip
    bos = decoder.bos_token_id
    if bos is not None and bos >= decoder.vocab_size and not f.problems:
        f.problem("bos_token_id", bos, f"below vocab_size = {decoder.vocab_size}")
    return decoder


def read_top_k(f: Fields, experts_field: str) -> tuple[int, int]:
    """The experts of a layer, and how many of them a token goes to."""
    experts, top_k = f.count(experts_field, MOST_EXPERTS), f.count("num_experts_per_tok")
    if top_k > experts:
        f.problem("num_experts_per_tok", top_k, f"at most {experts_field} = {experts}")
    return experts, top_k
