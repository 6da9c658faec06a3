"""transformers as the oracle: MixtralForCausalLM on dequantized weights, float32, CPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoint_builders import dequantized_state_dict
from torch import Tensor
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from layersweep.kv import parse
from layersweep.kv.store import KvStore
from layersweep.kv.stream import keys_and_values


def oracle_model(folder: Path) -> MixtralForCausalLM:
    """The checkpoint in `folder`, dequantized by the tests' own code, in transformers."""
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("quantization_config", None)
    fields.pop("dtype", None)
    config = MixtralConfig(**{k: v for k, v in fields.items() if k != "architectures"})
    config._attn_implementation = "sdpa"
    model = MixtralForCausalLM(config).float().eval()
    model.set_experts_implementation("eager")
    missing, unexpected = model.load_state_dict(dequantized_state_dict(folder), strict=False)
    assert not unexpected
    assert all("inv_freq" in name for name in missing)
    return model


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rope_tables(theta: float, dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    inverse = theta ** (-torch.arange(0, dim, 2).double() / dim)
    angle = torch.outer(torch.arange(tokens).double(), inverse)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().float(), angle.sin().float()


Through = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def codec_of(name: str, layers: int) -> Through:
    """decode(encode) of a layer's keys (before RoPE) and values, without the sweep."""
    arm = parse(name)

    def through(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        streams = keys_and_values(keys.shape[1], keys.shape[3])
        store = KvStore.empty([(arm, streams)], layer, layers).appended((keys, values))
        decoded_keys, decoded_values = store.decoded(0)
        return decoded_keys, decoded_values

    return through


@dataclass(frozen=True)
class Prefilled:
    """What a model keeps of a prefix. `projected`: keys [1, tokens, heads * dim] before RoPE."""

    tokens: int
    cache: DynamicCache
    projected: list[Tensor]


def prefilled(model: MixtralForCausalLM, prefix: list[int]) -> Prefilled:
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        projected: list[Tensor] = []
        hooks = [
            layer.self_attn.k_proj.register_forward_hook(lambda m, i, out: projected.append(out))
            for layer in model.model.layers
        ]
        model(torch.tensor([prefix]), past_key_values=cache)
        for hook in hooks:
            hook.remove()
    return Prefilled(len(prefix), cache, projected)


def scored_with_cache(
    model: MixtralForCausalLM,
    prefix: list[int] | Prefilled,
    branch: list[int],
    through: Through | None,
    compress: Callable[[DynamicCache], object] | None = None,
) -> Tensor:
    """Log-probabilities [len(branch) - 1] of branch[1:], after the prefix's cache was replaced.

    `through(keys before RoPE, values, layer)` is what a codec makes of a layer's prefix;
    `compress` is somebody else's program that overwrites the whole cache itself.
    """
    kept = prefix if isinstance(prefix, Prefilled) else prefilled(model, prefix)
    with torch.inference_mode():
        cache = copy.deepcopy(kept.cache)
        if compress is not None:
            compress(cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.float(), layer.values.float()
        if through is not None:
            theta = model.config.rope_parameters["rope_theta"]
            cos, sin = rope_tables(theta, model.config.head_dim, kept.tokens)
            for index, layer in enumerate(cache.layers):
                # keys before RoPE, as the projection gave them: undoing RoPE would round
                plain = kept.projected[index].view(1, kept.tokens, -1, model.config.head_dim)
                keys, values = through(plain.transpose(1, 2), layer.values, index)
                layer.keys = keys * cos + rotate_half(keys) * sin
                layer.values = values
        logits = model(torch.tensor([branch]), past_key_values=cache).logits[0, :-1]
        target = torch.tensor(branch[1:])
        return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
