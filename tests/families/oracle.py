"""transformers as the oracle: float32, CPU, its plain attention and its plain loop over experts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from families.probe import (
    NEEDLE_ANSWER,
    PREFIX,
    Losses,
    needle_ids,
    window_ids,
)
from families.small import Tiny, as_published, read_fields, write_config
from families.weights import randomize

disable_progress_bar()


def make(tiny: Tiny, folder: Path) -> None:
    """A random model of `tiny` in `folder`, as transformers publishes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some modules draw what they start from, and `randomize` adds to it
        model = _empty(tiny.config())
    randomize(model)
    model.save_pretrained(folder)
    if tiny.published:
        write_config(folder, as_published(read_fields(folder)))


def weigh(tiny: Tiny) -> int:
    """Its parameters, without the memory for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.config())
    return sum(one.numel() for one in model.parameters())


def opened(folder: Path) -> PreTrainedModel:
    """The model that transformers reads from `folder`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return _plain(model)


def rebuilt(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """`model`'s weights under another configuration. Raises RuntimeError where they do not fit."""
    other = _empty(config)
    other.load_state_dict(model.state_dict())
    return other


def losses(model: PreTrainedModel) -> Losses:
    """Whole sequences in one forward pass each: neither a cache nor a branch.

    The shorter one first: dynamic RoPE keeps the table of the longest sequence that it has seen.
    """
    vocab = model.get_output_embeddings().weight.shape[0]
    needle = token_losses(model, needle_ids(vocab)[None])[0, -NEEDLE_ANSWER:]
    return Losses(token_losses(model, window_ids(vocab))[:, PREFIX:], needle)


def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, T - 1] of ids [B, T], all but the first."""
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[:, :-1]
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def effects(model: PreTrainedModel) -> dict[str, float]:
    """How far the mean loss moves with each tensor, to first order, when it grows by its own size;
    of a tensor without a gradient, when it is zeroed."""
    ids = window_ids(model.get_output_embeddings().weight.shape[0])
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.grad is not None:
            found[name] = (tensor.grad.norm() * tensor.norm()).item()
        elif tensor.is_floating_point():
            found[name] = _without(model, tensor, loss.item())
    model.zero_grad()
    return found


def _without(model: PreTrainedModel, tensor: Tensor, loss: float) -> float:
    ids = window_ids(model.get_output_embeddings().weight.shape[0])
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.zero_()
        other = model(ids, labels=ids, use_cache=False).loss.item()
        tensor.copy_(kept)
    return abs(other - loss)


def _empty(config: PreTrainedConfig) -> PreTrainedModel:
    config._attn_implementation = "eager"
    return _plain(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    model.set_experts_implementation("eager")
    return model.eval()
