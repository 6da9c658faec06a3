"""A KV cache for any Hugging Face model that goes through one of our codecs.

    cache = cache_for(model, "K3V2")
    model.generate(**inputs, past_key_values=cache)

Every read goes through the codec, the first included: transformers' own quantized cache returns
the original keys and values of its first call, so that a one-shot perplexity through it measures
nothing. Models hand their keys over after RoPE; it is undone before encoding and done again after
decoding, by the model's own tables and the token's index in the cache. Under left padding that
index is not the position, which shifts all keys of a sequence alike and changes no score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from layersweep.errors import InputError
from layersweep.kv.arms import Arm, parse
from layersweep.kv.store import KvStore
from layersweep.kv.stream import Stream, keys_and_values

MEAN_TOKENS = 128  # a channel mean comes from the first tokens that are coded, and is frozen


def cache_for(model: Any, kv: str) -> Cache:
    """A cache for `model.generate(past_key_values=...)` under the arm `kv`.

    Raises InputError for an unknown arm, for a model without rotary embeddings in the usual place
    (model.model.rotary_emb), and for sliding windows, which drop tokens.
    """
    arm = parse(kv)
    rotary = getattr(getattr(model, "model", model), "rotary_emb", None)
    if rotary is None:
        raise InputError(
            f"{type(model).__name__}: found no model.rotary_emb, needed it to undo RoPE",
            hint="decoder models of transformers with one rotary table are supported",
        )
    streams, count = _streams(model.config), model.config.get_text_config().num_hidden_layers
    for stream in streams:
        if stream.window is not None:
            raise InputError(
                f"{type(model).__name__}: found sliding_window {stream.window}, needed none",
                hint="set config.sliding_window = None where the context is shorter than it",
            )
    return Cache(layers=[CodedLayer(arm, rotary, streams, i, count) for i in range(count)])


def _streams(config: Any) -> tuple[Stream, Stream]:
    """What a layer keeps, by the names that configs of transformers have for it."""
    config = config.get_text_config()
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    window = getattr(config, "sliding_window", None) or None
    if not getattr(config, "use_sliding_window", True):
        window = None
    return keys_and_values(heads, dim, window)


class CodedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values as an arm keeps them. Everything that is read has gone through
    the codec, the newest token included, except what `@sink`, `@window`, `@pb` and 16 bits keep
    exact."""

    is_compileable = False
    is_sliding = False

    def __init__(
        self, arm: Arm, rotary: Any, streams: tuple[Stream, Stream], layer: int, num_layers: int
    ) -> None:
        super().__init__()
        self.rotary, self.streams = rotary, streams
        self.empty = KvStore.empty([(arm, streams)], layer, num_layers, MEAN_TOKENS)
        self.store = self.empty

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens; all keys (rotated) and values so far, as decoded from the codec."""
        self.is_initialized = True
        first, new = self.store.tokens, (key_states, value_states)
        self.store = self.store.appended(self._rotated(new, first, back=True))
        if key_states.shape[2] > 1:  # exact tokens are views: a copy lets go of the others
            self.store = self.store.moved(torch.clone)
        keys, values = self._rotated(self.store.decoded(0), 0, back=False)
        return keys, values

    def _rotated(self, tensors: tuple[Tensor, ...], first: int, *, back: bool) -> list[Tensor]:
        """What the model rotates, at the positions from `first` on."""
        return [
            self._rotate(x, first, back=back) if stream.rope else x
            for x, stream in zip(tensors, self.streams, strict=True)
        ]

    def _rotate(self, x_BHTD: Tensor, first: int, *, back: bool) -> Tensor:
        """Rotate to the positions from `first` on, or back, in float32; also partial rotaries."""
        at = torch.arange(first, first + x_BHTD.shape[2], device=x_BHTD.device)[None]
        cos, sin = (table[0].float() for table in self.rotary(x_BHTD.float(), at))  # [T, R]
        size, x = cos.shape[-1], x_BHTD.float()
        rotated, rest, half = x[..., :size], x[..., size:], size // 2
        turned = torch.cat((-rotated[..., half:], rotated[..., :half]), dim=-1)
        if back:  # the inverse of a rotation that some models scale
            rotated = (rotated * cos - turned * sin) / (cos * cos + sin * sin)
        else:
            rotated = rotated * cos + turned * sin
        return torch.cat((rotated, rest), dim=-1).to(x_BHTD.dtype)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys that will be there, offset of the first), for the attention mask."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + count, 0

    def get_seq_length(self) -> int:
        return self.store.tokens

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under the name that earlier releases of transformers 5 use."""
        return -1

    def reset(self) -> None:
        self.store, self.is_initialized = self.empty, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError(
            "KV codec cache: found a beam search, needed greedy search or sampling",
            hint="num_beams=1",
        )

    @property
    def bits_per_element(self) -> float:
        """Measured, over keys and values so far."""
        return self.store.nbits(0) / self.store.elements(0)
