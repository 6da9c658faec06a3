"""Pieces that the families' tables are made of, as most configs say them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layersweep.families.fields import MOST_EXPERTS, MOST_LAYERS, ROPE_HINT, Fields
from layersweep.families.spec import Attention, Decoder, Feed, Layer, Norm, Rope

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Sizes:
    """Those that every config has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: Norm


def read_sizes(f: Fields, *, offset: float = 0.0, head_dim: int | None = None) -> Sizes:
    """`offset`: of the norms' weights; `head_dim` where the family does not ask its field."""
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    shared = f.get("num_key_value_heads")
    kv_heads = heads if shared is None else f.count("num_key_value_heads")
    if heads % kv_heads:
        f.problem("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    return Sizes(
        hidden, f.count("num_hidden_layers", MOST_LAYERS), heads, kv_heads,
        head_dim or f.head_dim(hidden, heads), Norm(f.number("rms_norm_eps"), offset),
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


def read_windows(
    f: Fields, sizes: Sizes, slides: Callable[[int], bool], *, used: bool = True
) -> list[int | None]:
    """The window of each layer: of those that `layer_types` names, else of those that `slides`.
    Where it is not `used`, sliding_window counts for nothing."""
    window = f.optional_count("sliding_window") if used else None
    types = f.each_layer("layer_types", sizes.layers, *LAYER_TYPES)
    if types is None:
        sliding = [slides(index) for index in range(sizes.layers)]
    else:
        sliding = [kind == "sliding_attention" for kind in types]
    if any(sliding) and window is None:
        needed = "a window, which layer_types names" if types else "a positive integer"
        f.problem("sliding_window", f.get("sliding_window") if used else None, needed)
    f.ignore("sliding_window")
    return [window if one else None for one in sliding]


def read_patterned_windows(f: Fields, sizes: Sizes) -> list[int | None]:
    """The same where every `sliding_window_pattern`th layer sees everything."""
    every = 1 if f.get("layer_types") else f.count("sliding_window_pattern")
    f.ignore("sliding_window_pattern")
    return read_windows(f, sizes, lambda index: (index + 1) % every > 0)


def read_two_ropes(
    f: Fields, head_dim: int, *, near_theta: str = "rope_theta"
) -> tuple[Rope, Rope]:
    """Of layers that see everything, and of windows: by type in one object, or, in older files, a
    scaled one with rope_theta and a plain one with `near_theta`."""
    given, scaled = f.object("rope_parameters"), f.object("rope_scaling")
    full, near = (part if isinstance(part, dict) else {} for part in map(given.get, LAYER_TYPES))
    if given and (scaled or any(key not in LAYER_TYPES for key in given)):
        f.problem("rope_parameters", given, "a RoPE for each type of layer, alone", ROPE_HINT)
    return f.rope(head_dim, parts=full or scaled), f.rope(head_dim, parts=near, theta=near_theta)


def windowed(layers: Sequence[Layer], windows: Sequence[int | None]) -> list[Layer]:
    """The same layers, each with its window."""
    return [
        replace(layer, attention=replace(layer.attention, window=window))
        for layer, window in zip(layers, windows, strict=True)
    ]


def mixed(attention: Attention, sizes: Sizes, feeds: Sequence[Feed]) -> list[Layer]:
    """Layers that differ in their feed alone, norms before both halves."""
    return [pre_norm(attention, feed, sizes.norm) for feed in feeds]


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


def read_top_k(
    f: Fields, experts_field: str, top_k_field: str = "num_experts_per_tok"
) -> tuple[int, int]:
    """The experts of a layer, and how many of them a token goes to."""
    layers = f.get("num_hidden_layers")
    sound = type(layers) is int and 0 < layers <= MOST_LAYERS  # else it is reported already
    experts = f.count(experts_field, MOST_EXPERTS // layers if sound else MOST_EXPERTS)
    top_k = f.count(top_k_field)
    if top_k > experts:
        f.problem(top_k_field, top_k, f"at most {experts_field} = {experts}")
    return experts, top_k
