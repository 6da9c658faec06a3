"""How large a cache is at a context that nobody has to compute: 4K or 32K tokens, by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layersweep.kv.arms import Arm
from layersweep.kv.codec import Codec, finds_sinks, grouping, role_bits
from layersweep.kv.methods import EXACT_BITS
from layersweep.kv.stream import State, Stream

if TYPE_CHECKING:
    from torch import Tensor

Keeps = Sequence[Stream | State]  # what one layer keeps

# Vectors of a probe: sizes are rounded up to bytes once per tensor, which spread over so many
# tokens is below a part in ten thousand.
_PROBE = 64


@dataclass(frozen=True)
class KvSize:
    """What a cache of `tokens` tokens takes in all its layers.

    nbytes       of the streams, by the arm; NaN for a codec of one's own that cannot say
    elements     numbers that these streams have uncompressed: tokens beyond a window do not count
    state_bytes  of the states, which are exact
    """

    tokens: int
    nbytes: float
    elements: int
    state_bytes: float

    @property
    def bits_per_element(self) -> float:
        """Over the streams alone. NaN where a model has none."""
        return 8 * self.nbytes / self.elements if self.elements else math.nan

    @property
    def bytes_per_token(self) -> float:
        """Over everything that the cache holds."""
        return (self.nbytes + self.state_bytes) / self.tokens


def kv_size(arm: Arm, layers: Sequence[Keeps], tokens: int, like: Tensor | None = None) -> KvSize:
    """Size after `tokens` >= 1 tokens, whose next one is still to come: a layer with a window W
    holds the last W - 1. `layers`: of the whole model, in order. `like`: of
    the device and dtype on which a few vectors are encoded to see what they take, by default the
    CPU's. InputError for a stream that the codec cannot take."""
    bits, elements, state_bits = 0.0, 0, 0
    known: dict[tuple[Stream, Arm], float] = {}
    for layer, keeps in enumerate(layers):
        own = arm.in_layer(layer, len(layers))
        for kept in keeps:
            if isinstance(kept, State):
                state_bits += kept.elements * kept.bits
                continue
            if (kept, own) not in known:
                known[kept, own] = _stream_bits(own, kept, tokens, like)
            bits += known[kept, own]
            elements += kept.heads * kept.dim * (tokens - kept.first_held(tokens))
    return KvSize(tokens, bits / 8, elements, state_bits / 8)


def _stream_bits(arm: Arm, stream: Stream, tokens: int, like: Tensor | None) -> float:
    """Bits of one stream of one sequence, counted as StoredStream.nbits."""
    first, element_bits = stream.first_held(tokens), stream.heads * stream.dim * EXACT_BITS
    codec = None if arm.keeps_window(stream.window) else arm.codec
    if codec is None or (arm.method != "identity" and role_bits(codec, stream) == EXACT_BITS):
        return (tokens - first) * element_bits
    coded = max(arm.coded_until(tokens) - max(first, arm.sink), 0)
    bits = (tokens - first - coded) * element_bits + _coded_bits(codec, stream, coded, like)
    if coded and finds_sinks(codec):  # a bit for each token, and what sinks are compared with
        bits += 8 * -(-coded // 8) + element_bits
    if arm.fine_codec:
        bits += _coded_bits(arm.fine_codec, stream, min(coded, arm.fine), like)
    return bits


def _coded_bits(codec: Codec, stream: Stream, tokens: int, like: Tensor | None) -> float:
    """Bits of `tokens` tokens in a codec: means are counted once, groups of tokens are alike."""
    how = grouping(codec, stream.role)
    step = how.group * -(-_PROBE // how.group)
    few = step * (1 + -(-how.keep // step)) + tokens % step
    if tokens <= few:
        return 8 * _probe(codec, stream, tokens, like) if tokens else 0.0
    low, high = (_probe(codec, stream, count, like) for count in (few, few + step))
    return 8 * (low + (tokens - few) // step * (high - low))


def _probe(codec: Codec, stream: Stream, tokens: int, like: Tensor | None) -> float:
    """Bytes that the codec counts for so many vectors of zeros."""
    import torch

    from layersweep.kv.means import mean_for

    like = torch.empty(0) if like is None else like
    x = like.new_zeros(1, stream.heads, tokens, stream.dim)
    at = torch.arange(tokens, device=like.device)[None]
    return codec.nbytes(codec.encode(x, stream, at, mean_for(codec, x)))
