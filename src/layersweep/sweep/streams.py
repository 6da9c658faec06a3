"""What a layer's cache keeps: of a token by the description of its attention, and its states."""

from __future__ import annotations

from layersweep.families.spec import Attention, Decoder
from layersweep.kv.stream import State, Stream, keys_and_values, latent_streams


def streams_of(attention: Attention) -> tuple[Stream, ...]:
    """Keys and values, or a latent and the rotary key that all heads share."""
    latent, window = attention.latent, attention.window
    if latent:
        return latent_streams(latent.kv_rank, latent.rope_dim, window)
    return keys_and_values(attention.num_kv_heads, attention.head_dim, window, attention.value_dim)


def layer_streams(decoder: Decoder) -> list[tuple[Stream, ...]]:
    """Of each layer; nothing of one that has no keys."""
    of = {
        layer: streams_of(layer.attention) if layer.attention.num_kv_heads else ()
        for layer in decoder.distinct_layers
    }
    return [of[layer] for layer in decoder.layers]


def every_stream(decoder: Decoder) -> list[Stream]:
    """The different streams of all layers."""
    return list(dict.fromkeys(stream for layer in layer_streams(decoder) for stream in layer))


def layer_states(decoder: Decoder) -> list[tuple[State, ...]] | None:
    """Of each layer, for one sequence; None where the size of one is not known."""
    if decoder.generic is None:
        return [()] * len(decoder.layers)
    kept = [layer.states for layer in decoder.generic.layers]
    if None in kept:
        return None
    return [
        tuple(State(one.name, one.elements, one.bits) for one in states or ()) for states in kept
    ]


def state_bytes(decoder: Decoder) -> int | None:
    """Of all layers together, for one sequence."""
    states = layer_states(decoder)
    if states is None:
        return None
    return sum(one.elements * one.bits // 8 for layer in states for one in layer)
