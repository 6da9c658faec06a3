"""The cache that a swept model hands to transformers, and gets back with the next tokens."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from layersweep.errors import InputError
from layersweep.families.spec import Decoder
from layersweep.kv.arms import Arm
from layersweep.kv.fit import Fit
from layersweep.kv.size import KvSize, kv_size
from layersweep.sweep.running import RunningCaches, Text
from layersweep.sweep.streams import layer_streams


class SweptCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Keys and values of a batch of texts, a Text each, in rows of their own.

    `columns`: tokens that transformers has handed over per text, padding included. A text has none
    of the padding. The memory is free when the cache is dropped.
    """

    def __init__(
        self, arm: Arm, decoder: Decoder, batch: int, reach: int, device: torch.device,
        fits: dict[int, Fit],
    ) -> None:  # fmt: skip
        super().__init__(layers=[])
        self.decoder, self.arm, self.columns = decoder, arm, 0
        self.texts = [Text(arm, reach, decoder.num_hidden_layers) for _ in range(batch)]
        self.running = RunningCaches(device)
        self.running.fits = fits

    def new_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
        """What each text reads next: `input_ids` [B, T] without padding, by `attention_mask`
        [B, columns + T] of 0 and 1, None for no padding. Raises InputError for other padding than
        on the left, and for a mask that does not belong to the cache."""
        batch, tokens = input_ids.shape
        shape = batch, self.columns + tokens
        if batch != len(self.texts):
            raise InputError(
                f"input_ids: found {batch} texts, needed the {len(self.texts)} of the cache"
            )
        mask = torch.ones(shape) if attention_mask is None else attention_mask
        if mask.shape != shape:
            raise InputError(
                f"attention_mask: found shape {list(mask.shape)}, needed {list(shape)}: a number "
                "for each token of the cache and each new one"
            )
        seen = mask.bool()
        padded_left = (seen[:, :-1] <= seen[:, 1:]).all(1).tolist()
        lengths = seen.sum(1).tolist()
        for row, text in enumerate(self.texts):
            if not padded_left[row]:
                raise InputError(
                    f"attention_mask: text {row} has padding behind its first token, needed it on "
                    "the left",
                    hint='tokenizer.padding_side = "left"',
                )
            before = max(lengths[row] - tokens, 0)
            if before != text.end or lengths[row] == text.end:
                raise InputError(
                    f"attention_mask: text {row} has {before} tokens before {lengths[row] - before}"
                    f" new ones, needed the {text.end} of the cache and at least one new one",
                    hint="the mask covers the cache, too, as it was when its tokens came",
                )
        return [
            own[-(length - text.end) :]
            for own, length, text in zip(input_ids.tolist(), lengths, self.texts, strict=True)
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int = 0) -> int:
        return self.texts[0].reach

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The same under the name that earlier releases of transformers 5 use."""
        return self.get_max_length()

    @torch.inference_mode()
    def reset(self) -> None:
        """Without tokens."""
        for text in self.texts:
            self.running.leave(text)
            text.forget()
        self.columns = 0

    @property
    def is_linear(self) -> list[bool]:
        """Not one layer has a state instead of keys."""
        return [False] * self.decoder.num_hidden_layers

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """What it takes on the device."""
        return self.running.nbytes

    @property
    def size(self) -> KvSize:
        """What the arm keeps of all texts together, by arithmetic. Texts have tokens."""
        layers = layer_streams(self.decoder)
        return reduce(_sum, (kv_size(self.arm, layers, text.end) for text in self.texts))

    def crop(self, tokens_to_remove: int) -> None:
        raise _cannot("take tokens back, as assisted decoding does")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise _cannot("reorder its texts, as a beam search does")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _cannot("repeat its texts")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise _cannot("drop some of its texts")


def _sum(one: KvSize, other: KvSize) -> KvSize:
    return KvSize(
        one.tokens + other.tokens,
        one.nbytes + other.nbytes,
        one.elements + other.elements,
        one.state_bytes + other.state_bytes,
    )


def _cannot(what: str) -> InputError:
    return InputError(
        f"cache of a swept model: asked to {what}, needed texts that only grow",
        hint="greedy search or sampling, with num_beams=1 and no assistant",
    )
