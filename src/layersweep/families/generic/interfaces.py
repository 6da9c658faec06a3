"""Our names in transformers' public registries: attention, masks, experts.

A model built with these names calls back here. What happens then is the business of whoever runs
the forward pass in this thread (`visiting`): a rehearsal takes notes, a sweep computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layersweep.errors import InputError

NAME = "layersweep"
OWN_MASK = "a mask of the model's own"

# What models hand through to the attention function, and it may ignore: it computes one row batch
# without a cache, and sequences and positions are known.
_NEUTRAL = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "is_causal",
    "max_length_k", "max_length_q", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_ids", "seq_idx", "training", "use_cache",
}  # fmt: skip


class Unsupported(InputError):
    """A decoder that this path cannot run: which part of it, what was found, what was needed."""

    def __init__(self, where: str, found: str, needed: str, *, hint: str = "") -> None:
        super().__init__(f"{where}: found {found}, needed {needed}", hint=hint)
        self.where, self.found, self.needed = where, found, needed


@dataclass(frozen=True)
class Sight:
    """What a layer's mask would show: takes its place, since a mask is [N, N].

    `width`: of a sliding window or of a chunk, None for all that came before. `kind` is "" where
    rows of several sequences hide which of the two it is.
    """

    width: int | None
    kind: str = ""


@dataclass(frozen=True)
class Attend:
    """The scalars and the sinks of one attention call. `sinks` [Q]: a score per head that takes
    its part of the softmax and adds nothing."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    sight: Sight | None


class Visitor(Protocol):
    """Whoever runs a forward pass."""

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        """Attention of a layer's rows, keys after RoPE: [1, Q, N, D of the values]."""

    def sight(self, width: int | None, shows: Any) -> Sight:
        """What stands for a mask of this width; `shows(batch, head, query, key)` is the mask."""

    def experts(
        self, module: nn.Module, rows_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        """The weighted sum of each row's experts: [N, H]."""


_this_thread = threading.local()


@contextmanager
def visiting(visitor: Visitor) -> Iterator[None]:
    """Forward passes of this thread call `visitor`."""
    before = getattr(_this_thread, "visitor", None)
    _this_thread.visitor = visitor
    try:
        yield
    finally:
        _this_thread.visitor = before


@cache
def register() -> None:
    """Make our names known to transformers; at first use, since importing changes nothing."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


def current() -> Any:
    """The visitor of this thread."""
    visitor: Visitor | None = getattr(_this_thread, "visitor", None)
    assert visitor is not None, "a model of this path was called outside of a sweep"
    return visitor


# transformers calls these with what each model adds, so that they must take any keyword


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    window, softcap = others.pop("sliding_window", None), others.pop("softcap", None)
    sinks, causal = others.pop("s_aux", None), others.get("is_causal", True)
    unknown = {name for name, value in others.items() if value is not None and name not in _NEUTRAL}
    where = type(module).__name__
    if unknown:
        arguments = "an attention argument" if len(unknown) == 1 else "attention arguments"
        names = ", ".join(sorted(unknown))
        raise Unsupported(where, f"{arguments}: {names}", "what this version computes with")
    if causal is False or getattr(module, "is_causal", True) is False:
        raise Unsupported(where, "attention that looks ahead", "causal attention")
    if dropout:
        raise Unsupported(where, f"dropout {dropout}", "none")
    if attention_mask is not None and not isinstance(attention_mask, Sight):
        raise Unsupported(where, OWN_MASK, "causal attention, a window or chunks")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = Attend(scale, window or None, softcap, sinks, attention_mask)
    return current().attend(module, query, key, value, call).transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any, **others: Any
) -> Sight:
    found: Sight = current().sight(others.get("local_size"), mask_function)
    return found


def _experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    found: Tensor = current().experts(module, hidden_states, top_k_index, top_k_weights)
    return found


def shown(shows: Any, width: int | None) -> str:
    """ "causal", "window", "chunk" or "other": which of these a mask function of `width` is.

    Asked about single pairs around the places where the three differ.
    """
    at = width or 8
    queries = [0, 1, at - 1, at, at + 1, 2 * at, 2 * at + 1, 3 * at + 2]
    pairs = [(q, q - back) for q in queries for back in (-1, 0, 1, at - 1, at, at + 1) if q >= back]

    def matches(rule: Any) -> bool:
        return all(bool(shows(0, 0, _at(q), _at(k))) == rule(q, k) for q, k in pairs)

    if width is None:
        return "causal" if matches(lambda q, k: k <= q) else "other"
    if matches(lambda q, k: k <= q and k > q - width):
        return "window"
    return "chunk" if matches(lambda q, k: k <= q and k // width == q // width) else "other"


def _at(index: int) -> Tensor:
    return torch.tensor(index)
