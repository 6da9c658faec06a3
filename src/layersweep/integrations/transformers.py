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
from layersweep.kv.growing import GrowingStream
from layersweep.kv.stream import Stream


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
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise InputError(
            f"{type(model).__name__}: found sliding_window {config.sliding_window}, needed none",
            hint="set config.sliding_window = None where the context is shorter than it",
        )
    count = config.num_hidden_layers
    return Cache(layers=[CodedLayer(arm, rotary, layer, count) for layer in range(count)])


class CodedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values as an arm keeps them."""

    is_compileable = False
    is_sliding = False

    def __init__(self, arm: Arm, rotary: Any, layer: int, num_layers: int) -> None:
        super().__init__()
        self.arm, self.rotary, self.place = arm, rotary, (layer, num_layers)
        self.streams: tuple[GrowingStream, GrowingStream] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pair = []
        for name, x in (("key", key_states), ("value", value_states)):
            is_key = name == "key"
            role = "key" if is_key else "value"
            stream = Stream(name, x.shape[1], x.shape[3], role=role, rope=is_key)  # type: ignore[arg-type]
            pair.append(GrowingStream(self.arm, stream, *self.place))
        self.streams = (pair[0], pair[1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens; all keys (rotated) and values so far, as decoded from the codec."""
        if self.streams is None:
            self.lazy_initialization(key_states, value_states)
        assert self.streams is not None
        keys, values = self.streams
        first, dtype = keys.tokens, key_states.dtype
        keys.append(self._rotate(key_states, first, back=True))
        values.append(value_states)
        return self._rotate(keys.decoded(dtype), 0, back=False), values.decoded(dtype)

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
        return 0 if self.streams is None else self.streams[0].tokens

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under the name that earlier releases of transformers 5 use."""
        return -1

    def reset(self) -> None:
        self.streams, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError(
            "KV codec cache: found a beam search, needed greedy search or sampling",
            hint="num_beams=1",
        )

    @property
    def bits_per_element(self) -> float:
        """Measured, over keys and values so far."""
        assert self.streams is not None
        streams = self.streams
        elements = sum(s.decoded(torch.float32).numel() for s in streams)
        return sum(s.nbits for s in streams) / elements
