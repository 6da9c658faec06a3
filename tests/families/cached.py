"""transformers' cache of a prefix, overwritten by what a codec makes of it.

A codec sees keys before RoPE, so they are taken from the arguments of the family's own function
that applies it, and pass through that function again.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

APPLY_ROPE = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")

# (keys before RoPE, values, layer) -> what a codec makes of them, [B, heads, T, dim] each; of
# latent attention: (latent, rotary key before RoPE, layer), with one head
Through = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kept:
    """A layer's keys before RoPE, what is kept beside them, and RoPE itself."""

    keys: Tensor
    rotate: Callable[[Tensor], Tensor]


@dataclass
class Prefilled:
    tokens: int
    cache: DynamicCache
    kept: dict[int, Kept] = field(default_factory=dict)


def prefilled(model: PreTrainedModel, prefix: Tensor) -> Prefilled:
    """After prefix [T]."""
    found = Prefilled(len(prefix), DynamicCache(config=model.config))
    with torch.inference_mode(), _watched(model, found.kept):
        model(prefix[None], **_given(model, found.cache))
        for index, kept in found.kept.items():
            _check_kept(kept, found.cache.layers[index])
    return found


def _check_kept(kept: Kept, layer: Any) -> None:
    """Raises NotImplementedError where the cache holds anything but the rotated keys: a norm that
    follows RoPE, or a part of the head that was turned alone."""
    turned = kept.rotate(kept.keys)
    held = (layer.keys, layer.values)
    if not any(
        one.shape[-1] == turned.shape[-1] and torch.equal(one, turned[:, :, -one.shape[2] :])
        for one in held
    ):
        raise NotImplementedError("the cache does not hold keys as RoPE left them")


def branch_losses(
    model: PreTrainedModel, prefix: Prefilled, branch: Tensor, through: Through | None
) -> Tensor:
    """[len(branch) - 1], with the prefix's cache replaced by what `through` makes of it."""
    cache = copy.deepcopy(prefix.cache)
    with torch.inference_mode():
        if through is not None:
            for index, layer in enumerate(cache.layers):
                _overwrite(layer, prefix.kept.get(index), index, through)
        logits = model(branch[None], **_given(model, cache)).logits[0, :-1]
    return -logits.log_softmax(-1).gather(-1, branch[1:, None])[:, 0]


def _given(model: PreTrainedModel, cache: DynamicCache) -> dict[str, DynamicCache]:
    """By the name of the argument, which transformers is changing."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def _overwrite(layer: Any, kept: Kept | None, index: int, through: Through) -> None:
    """A window's layer holds its last tokens alone; a latent one (latent, rotated key); one with
    a state has no keys."""
    if kept is None:
        if getattr(layer, "keys", None) is not None:  # no RoPE in this layer
            layer.keys, layer.values = through(layer.keys, layer.values, index)
        return
    held = layer.keys.shape[2]
    if kept.keys.shape[1:] == layer.values.shape[1:] and kept.keys.shape != layer.keys.shape:
        layer.keys, rotary = through(layer.keys, kept.keys, index)
        layer.values = kept.rotate(rotary)
        return
    # rows of a window keep their positions: the rotation is of all tokens
    whole = kept.keys.clone()
    whole[:, :, -held:], layer.values = through(kept.keys[:, :, -held:], layer.values, index)
    layer.keys = kept.rotate(whole)[:, :, -held:]


@contextmanager
def _watched(model: PreTrainedModel, kept: dict[int, Kept]) -> Iterator[None]:
    """Fill `kept` while the model runs."""
    module = sys.modules[type(model).__module__]
    current = [-1]

    def entered(layer: int) -> Callable[..., None]:
        return lambda *_: current.__setitem__(0, layer)

    def watching(apply: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        def applied(q: Tensor, k: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
            rotate = lambda keys: apply(q, keys, *rest, **more)[1]  # noqa: E731
            kept[current[0]] = Kept(k.clone(), rotate)
            return apply(q, k, *rest, **more)

        return applied

    own = {name: getattr(module, name) for name in APPLY_ROPE if hasattr(module, name)}
    hooks = [
        one.register_forward_pre_hook(entered(one.layer_idx))
        for one in model.modules()
        if isinstance(one, nn.Module) and hasattr(one, "layer_idx")
    ]
    try:
        for name, apply in own.items():
            setattr(module, name, watching(apply))
        yield
    finally:
        for name, apply in own.items():
            setattr(module, name, apply)
        for hook in hooks:
            hook.remove()
