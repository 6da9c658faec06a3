"""A decoder of transformers on the meta device: all of its structure, none of its weights."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError  # of configs that validate themselves
from torch import nn

from layersweep.families.generic.interfaces import NAME, Sight, Unsupported, register

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What code that is not ours raises for a config that it cannot take.
FOREIGN_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    NotImplementedError, RuntimeError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


def config_of(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """config.json as transformers understands it. Raises Unsupported for code that comes with the
    model, for an unknown model_type and for what transformers refuses."""
    from transformers import CONFIG_MAPPING

    if fields.get("auto_map") is not None:
        hint = "code of a checkpoint is never run; look for a converted one"
        needed = "a model_type that transformers implements itself"
        raise Unsupported("auto_map", "code that comes with the model", needed, hint=hint)
    kind = fields.get("model_type")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), 1)
        hint = f"did you mean '{near[0]}'?" if near else "a newer transformers may know it"
        raise Unsupported("model_type", f"'{kind}'", "one that transformers knows", hint=hint)
    try:
        return CONFIG_MAPPING[kind].from_dict(_with_floats(dict(fields)))
    except FOREIGN_FAILURES as failure:
        found = first_line(failure)
        raise Unsupported("config.json", found, "fields that transformers takes") from failure


def known_fields(kind: str) -> frozenset[str]:
    """Fields of config.json that transformers reads of a model_type."""
    from transformers import CONFIG_MAPPING

    of = CONFIG_MAPPING[kind]
    rope = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # in the words of transformers 4
    own = {one.name for one in dataclasses.fields(of)} | vars(of()).keys() | of.attribute_map.keys()
    others = {"architectures", "model_type", "quantization_config", "layersweep_synthetic"}
    return frozenset(own | rope | others)


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Of a model that reads images or sound, too, its language model, if that is one by itself."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    if text is config or type(text) not in AutoModelForCausalLM._model_mapping:
        return config
    text = copy.deepcopy(text)
    text.tie_word_embeddings = config.tie_word_embeddings  # the whole model's head is tied, or not
    return text


def _with_floats(value: Any) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(part) for key, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal model of a config, of which it gets a copy: models that share one share the
    choice of kernels, too. Raises Unsupported for what is no decoder alone."""
    from transformers import AutoModelForCausalLM

    where = f"model_type {config.model_type}"
    if type(config)().is_encoder_decoder or config.is_encoder_decoder:
        raise Unsupported(where, "an encoder-decoder", "a decoder")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise Unsupported(where, "no causal language model in transformers", "one")
    register()
    own = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                own, attn_implementation=NAME, experts_implementation=NAME, dtype=dtype
            )
    except FOREIGN_FAILURES as failure:
        raise Unsupported(where, first_line(failure), "a model that can be built") from failure
    if getattr(model.config, "vision_config", None):
        raise Unsupported(where, "a vision tower", "a text model")
    return model.eval()


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what is in no checkpoint, rotary frequencies for one, in float32, by the code that
    transformers runs after loading. Parameters stay on the meta device."""
    persistent = set(model.state_dict())
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if f"{name}.{key}".removeprefix(".") not in persistent:
                module._buffers[key] = torch.zeros_like(buffer, device=device)
    model.initialize_weights()


def base_of(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """All of a model but its head, and its name in the model."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    if decoder is not model:
        for name, part in model.named_children():
            if decoder in set(part.modules()):
                return name, part
    part = getattr(model, model.base_model_prefix, None)
    if isinstance(part, nn.Module):
        return model.base_model_prefix, part
    models = [name for name, one in model.named_children() if isinstance(one, PreTrainedModel)]
    if len(models) == 1:
        return models[0], model.get_submodule(models[0])
    raise Unsupported(type(model).__name__, "no decoder beside a head in it", "one")


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order: the one list of modules that is not within another."""
    _, base = base_of(model)
    lists = {name: part for name, part in base.named_modules() if isinstance(part, nn.ModuleList)}
    depth = min((name.count(".") for name in lists), default=0)
    outer = [part for name, part in lists.items() if name.count(".") == depth and len(part)]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    found = outer if len(outer) == 1 else [part for part in outer if len(part) == count]
    if len(found) != 1:
        sizes = ", ".join(str(len(part)) for part in outer) or "none"
        raise Unsupported(
            type(base).__name__, f"lists of {sizes} modules", f"one of the {count} decoder layers"
        )
    return found[0]


def first_line(failure: BaseException) -> str:
    """The first line of what somebody else raised, in words where it is about what is ours."""
    if Sight.__name__ in str(failure):
        return "a forward pass that computes with its attention mask"
    if isinstance(failure, KeyError) and failure.args == (NAME,):
        return "attention of its own, beside transformers' attention interface"
    text = str(failure).strip().split("\n")[0]
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__
