"""Layers that the kernels of a device cannot compute: refused by name before weights are read."""

from __future__ import annotations

from layersweep.errors import InputError
from layersweep.families.spec import Decoder
from layersweep.families.words import describe_attention
from layersweep.model.attention import Attention, Rule


def check_attention(decoder: Decoder, attention: Attention) -> None:
    """Raises InputError for a layer that the chosen kernels cannot compute, with the reason."""
    for layer in decoder.distinct_layers:
        one = layer.attention
        widest = max(one.head_dim, one.value_dim)
        why = attention.refusal(Rule.of(one), widest) if one.num_heads else None
        if why:
            first = decoder.layers.index(layer)
            raise InputError(
                f"layer {first} ({describe_attention(one)}): found a device whose attention is "
                f"{attention.name}, needed another: {why}",
                hint="--device cpu computes every layer",
            )
