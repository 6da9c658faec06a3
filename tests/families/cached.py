"""transformers' cache of a prefix, overwritten by what a codec makes of it.

A codec sees keys before RoPE, so they are taken from the arguments of the family's own function
that applies it, and pass through that function again.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
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
    with torch.no_grad(), _watched(model, found.cache, found.kept):
        model(prefix[None], **_given(model, found.cache))
    for index, kept in found.kept.items():
        layer = found.cache.layers[index]
        if not any(_holds(kept, held) for held in (layer.keys, layer.values)):
            found.kept[index] = _undone(kept, layer.keys)
    return found


def _holds(kept: Kept, held: Tensor) -> bool:
    """Whether a tensor of the cache is the last of the rotated keys."""
    turned = kept.rotate(kept.keys)[:, :, -held.shape[2] :]
    return turned.shape == held.shape and torch.allclose(turned, held, atol=1e-5)


def _undone(kept: Kept, held: Tensor) -> Kept:
    """The keys that RoPE would make `held` of, where it turned the first part of a head alone, or
    where a norm followed it. It turns pairs, so that its transpose turns them back.

    Raises NotImplementedError where it does more than turning.
    """
    part, rows = kept.keys.shape[-1], held.shape[2]

    def rotate(keys: Tensor) -> Tensor:
        return torch.cat((kept.rotate(keys[..., :part]), keys[..., part:]), -1)

    whole = held.new_zeros(*kept.keys.shape[:-1], held.shape[-1])
    keys = whole.clone().requires_grad_()
    whole[:, :, -rows:] = held
    (back,) = torch.autograd.grad(rotate(keys), keys, whole)
    found = Kept(back, rotate)
    if not _holds(found, held):
        raise NotImplementedError("the cache does not hold keys as RoPE left them")
    return found


def branch_losses(
    model: PreTrainedModel,
    prefix: Prefilled,
    branch: Tensor,
    through: Through | None,
    *,
    at_once: bool = True,
    as_seen: Container[int] = (),
) -> Tensor:
    """[len(branch) - 1], with the prefix's cache replaced by what `through` makes of it; tokens
    `at_once` or one after the other. `as_seen`: layers whose keys stay as attention sees them."""
    cache = copy.deepcopy(prefix.cache)
    found = []
    with torch.inference_mode():
        if through is not None:
            for index, layer in enumerate(cache.layers):
                kept = None if index in as_seen else prefix.kept.get(index)
                _overwrite(layer, kept, index, through)
        # Bamba would count the positions of each call from 0
        positions = torch.arange(prefix.tokens, prefix.tokens + len(branch))
        for some in torch.arange(len(branch)).split(len(branch) if at_once else 1):
            given = {**_given(model, cache), **_placed(model, positions[some])}
            found.append(model(branch[some][None], **given).logits[0])
    return -torch.cat(found)[:-1].log_softmax(-1).gather(-1, branch[1:, None])[:, 0]


def _given(model: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """By the name of the argument, which transformers is changing."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def _placed(model: PreTrainedModel, positions: Tensor) -> dict[str, Any]:
    """Where tokens stand, for a model that can be told."""
    known = inspect.signature(model.forward).parameters
    return {"position_ids": positions[None]} if "position_ids" in known else {}


def _overwrite(layer: Any, kept: Kept | None, index: int, through: Through) -> None:
    """A window's layer holds its last tokens alone; a latent one (latent, rotated key); one with
    a state has no keys."""
    if kept is None:
        if getattr(layer, "keys", None) is not None:  # none that is undone
            layer.keys, layer.values = through(layer.keys, layer.values, index)
        return
    held = layer.keys.shape[2]
    if not _holds(kept, layer.keys):
        layer.keys, rotary = through(layer.keys, kept.keys, index)
        layer.values = kept.rotate(rotary)
        return
    # rows of a window keep their positions: the rotation is of all tokens
    whole = kept.keys.clone()
    whole[:, :, -held:], layer.values = through(kept.keys[:, :, -held:], layer.values, index)
    layer.keys = kept.rotate(whole)[:, :, -held:]


@contextmanager
def _watched(model: PreTrainedModel, cache: DynamicCache, kept: dict[int, Kept]) -> Iterator[None]:
    """Fill `kept` while the model runs: keys are turned right before their layer's cache gets
    them."""
    module = sys.modules[type(model).__module__]
    turned: list[Kept] = []
    update = cache.update

    def watching(apply: Callable[..., Any]) -> Callable[..., Any]:
        def applied(q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Any:
            found = apply(q, k, *rest, **more)
            if isinstance(found, Tensor):  # queries, then keys: [B, T, heads, dim] and the angles
                x, rotate = q.transpose(1, 2), lambda x: apply(x.transpose(1, 2), k, *rest, **more)
                turned.append(Kept(x.clone(), lambda keys: rotate(keys).transpose(1, 2)))
            else:
                turned.append(Kept(k.clone(), lambda keys: apply(q, keys, *rest, **more)[1]))
            return found

        return applied

    def updating(keys: Tensor, values: Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        if turned:
            kept[layer] = turned[-1]
        turned.clear()
        return update(keys, values, layer, *rest, **more)

    own = {name: getattr(module, name) for name in APPLY_ROPE if hasattr(module, name)}
    try:
        for name, apply in own.items():
            setattr(module, name, watching(apply))
        cache.update = updating
        yield
    finally:
        for name, apply in own.items():
            setattr(module, name, apply)
        del cache.update
