"""config.json -> the decoder that transformers' own modules compute, and its weights' names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from layersweep.families.fields import MOST_EXPERTS, MOST_LAYERS
from layersweep.families.generic.build import base_of, build, config_of, text_part
from layersweep.families.generic.interfaces import Unsupported
from layersweep.families.generic.names import rows_together
from layersweep.families.generic.parts import GenericLayer, GenericParts
from layersweep.families.generic.rehearsal import Rehearsed, rehearse
from layersweep.families.generic.wanted import (
    GenericNames,
    pieces_of,
    short,
    split_key,
    stores_columns,
)
from layersweep.families.spec import Attention, Decoder, Feed, Layer, Norm, Router
from layersweep.families.weights import ROUTERS, BlockShape, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# A layer that keeps a state in place of keys and values.
NOTHING_KEPT = Attention(0, 0, 8, 8, 1.0, None)
_LENGTH_DECIDES = ("dynamic", "longrope")  # RoPE of longer sequences turns by other speeds


def describe_modules(fields: Mapping[str, Any]) -> tuple[Decoder, GenericNames]:
    """Raises Unsupported for what cannot be computed layer by layer."""
    whole = config_of(fields)
    config = text = text_part(whole)
    _check_counts(text)
    limit = _longest(text)
    found = rehearse(config, limit)
    model = build(config)
    blocks = tuple(_blocks(model, found))
    parts = tuple(layer for layer, _, _ in found.layers)
    chunks = [layer.chunk for layer in parts if layer.chunk]
    limit = min([limit, *chunks])  # within one chunk, all that came before is seen
    latent = getattr(text, "kv_lora_rank", None)
    why = "its cache is a latent, which transformers' attention function never sees"
    names = GenericNames(model, parts, blocks, text_part=config is not whole)
    decoder = Decoder(
        architecture=type(model).__name__,
        model_type=config.model_type,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        layers=tuple(_layer(model, *one) for one in found.layers),
        norm=Norm(1e-6),
        max_position_embeddings=limit,
        bos_token_id=_one(text.bos_token_id),
        eos_token_id=_one(text.eos_token_id),
        synthetic=bool(fields.get("layersweep_synthetic", False)),
        generic=GenericParts(
            config=json.dumps(dict(fields) if config is whole else config.to_dict()),
            layers=parts,
            blocks=blocks,
            exact_only=why if latent else "",
            text_of="" if config is whole else whole.model_type,
        ),
    )
    return decoder, names


def _check_counts(config: PreTrainedConfig) -> None:
    for name, most in (("num_hidden_layers", MOST_LAYERS), ("num_experts", MOST_EXPERTS)):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > most:
            raise Unsupported(f"{name} = {count}", "no model", f"at most {most}")


def _longest(config: PreTrainedConfig) -> int:
    """Most tokens of a sequence. Where the length of a sequence decides how fast its keys turn,
    those that turn alike."""
    limit = int(getattr(config, "max_position_embeddings", None) or 2**17)
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in _LENGTH_DECIDES:
            original = rope.get("original_max_position_embeddings")
            limit = min(limit, int(original or limit))
    return limit


def _ropes(found: Any) -> Iterator[dict[str, Any]]:
    """All of a config's, whatever layers they are for."""
    if isinstance(found, dict):
        if "rope_type" in found:
            yield found
        for part in found.values():
            yield from _ropes(part)


def _layer(
    model: PreTrainedModel, parts: GenericLayer, attention: Attention | None, per_token: int
) -> Layer:
    if parts.experts:
        experts: Any = model.get_submodule(parts.experts)
        inner = _expert_shapes(model, parts)["down_proj"][1]
        feed = Feed(inner, experts=experts.num_experts, router=Router(per_token))
    else:  # the widest matrix of the layer
        layer = model.get_submodule(parts.module)
        matrices = (max(one.shape) for one in layer.parameters() if one.ndim == 2)
        feed = Feed(max(matrices, default=model.config.get_text_config().hidden_size))
    return Layer(attention or NOTHING_KEPT, feed, None, None)


def _blocks(model: PreTrainedModel, found: Rehearsed) -> Iterator[BlockShape]:
    """Embedding (and whatever computes before the layers), layers, head (and all the rest)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    floats = re.compile(rf"(^|\.)({'|'.join(map(re.escape, kept)) or '$.'})(\.|$)")
    linear = frozenset(_linear_weights(model, found))

    def block(role: Any, layer: int | None, prefix: str, names: list[str]) -> BlockShape:
        keys: dict[str, Shape] = {}
        for name in names:
            key, rows = short(name.removeprefix(prefix)), rows_together(model, name)
            if not rows:
                keys[key] = shapes[name]
            for part, count in enumerate(rows):
                keys[f"{part}.{key}"] = (count, *shapes[name][1:])
        exact = {short(name.removeprefix(prefix)) for name in names if floats.search(name)}
        in_float32 = frozenset(key for key in keys if split_key(key)[1] in exact)
        packed = {short(name.removeprefix(prefix)) for name in names if name in linear} - exact
        of_linear = frozenset(key for key in keys if split_key(key)[1] in packed)
        return BlockShape(role, layer, keys, float32=in_float32, linear=of_linear)

    parts = [layer for layer, _, _ in found.layers]
    prefixes = tuple(f"{layer.module}." for layer in parts)
    beside = [name for name in shapes if not name.startswith(prefixes)]
    base, _ = base_of(model)  # its own parameters are at hand before and after the layers
    both = [name for name in beside if name.rpartition(".")[0] == base]
    first = [name for name in beside if name.rpartition(".")[0] in found.first and name not in both]
    yield block("embed", None, "", [*first, *both])
    for index, layer in enumerate(parts):
        routed = _expert_shapes(model, layer)
        own = [
            name
            for name in shapes
            if name.startswith(prefixes[index])
            and not (name.rpartition(".")[0] == layer.experts and name.rpartition(".")[2] in routed)
        ]
        yield block("attention", index, prefixes[index], own)
        if layer.experts:
            module: Any = model.get_submodule(layer.experts)
            pieces = dict(pieces_of(model, layer.experts, routed))
            for expert in range(module.num_experts):
                yield BlockShape("expert", index, pieces, expert)
    yield block("head", None, "", [name for name in beside if name not in first])


def _linear_weights(model: PreTrainedModel, found: Rehearsed) -> Iterator[str]:
    """Of the decoder layers, but for routers: what bitsandbytes packs."""
    for layer, _, _ in found.layers:
        for name, module in model.get_submodule(layer.module).named_modules():
            if isinstance(module, nn.Linear) and not ROUTERS & set(name.split(".")):
                yield f"{layer.module}.{name}.weight"


def _expert_shapes(model: PreTrainedModel, layer: GenericLayer) -> dict[str, tuple[int, ...]]:
    """Of the parameters that have a part for each expert: the shape of a part, as a linear layer
    has it."""
    if not layer.experts:
        return {}
    module: Any = model.get_submodule(layer.experts)
    return {
        key: tuple((parameter.mT if stores_columns(module, parameter) else parameter).shape[1:])
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.shape[0] == module.num_experts
    }


def _one(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids
