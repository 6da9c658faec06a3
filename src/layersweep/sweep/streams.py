"""What a layer's cache keeps of a token, by the description of its attention."""

from __future__ import annotations

from layersweep.families.spec import Attention, Decoder
from layersweep.kv.stream import Stream, keys_and_values, latent_streams


def streams_of(attention: Attention) -> tuple[Stream, ...]:
    """Keys and values, or a latent and the rotary key that all heads share."""
    latent, window = attention.latent, attention.window
    if latent:
        return latent_streams(latent.kv_rank, latent.rope_dim, window)
    return keys_and_values(attention.num_kv_heads, attention.head_dim, window, attention.value_dim)


def every_stream(decoder: Decoder) -> list[Stream]:
    """The different streams of all layers."""
    keeping = (one.attention for one in decoder.distinct_layers if one.attention.num_kv_heads)
    found = (stream for attention in keeping for stream in streams_of(attention))
    return list(dict.fromkeys(found))
