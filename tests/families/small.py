"""A small config.json of a model type: fields as transformers writes them, shrunk by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 24

# What a field is where a configuration class has it, and its table entry says nothing else. No two
# sizes are equal, heads * head_dim is not the hidden size: a swapped pair changes a shape.
SMALL: Mapping[str, object] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "sliding_window": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    # experts
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    # linear attention and state spaces
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 32,
    # names of GPT-2's time
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
}


@dataclass(frozen=True)
class Tiny:
    """A model type at its smallest.

    `fields`: what differs from SMALL and from the type's own defaults. `published`: config.json in
    the spelling of transformers 4, as most published files have it. Of the fields that `changes`
    changes, by their dotted names: `still` move no number of transformers' here, `unfit` need
    other weights, or are refused by transformers.
    """

    model_type: str
    fields: Mapping[str, object] = field(default_factory=dict)
    published: bool = False
    still: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    def config(self) -> PreTrainedConfig:
        """The type's own configuration class, shrunk."""
        kind = CONFIG_MAPPING[self.model_type]
        known = {one.name for one in dataclasses.fields(kind)} | kind.attribute_map.keys()
        given = {kind.attribute_map.get(name, name) for name in self.fields}
        small = {
            name: value
            for name, value in SMALL.items()
            if name in known and kind.attribute_map.get(name, name) not in given
        }
        if "kv_lora_rank" in known:
            small["num_key_value_heads"] = SMALL["num_attention_heads"]
        return kind(**small, **copy.deepcopy(dict(self.fields)))  # rope_parameters are completed


def write_config(folder: Path, fields: Mapping[str, object]) -> PreTrainedConfig:
    """config.json with `fields`, as transformers reads it."""
    write_json(folder, fields)
    return AutoConfig.from_pretrained(folder)


def write_json(folder: Path, fields: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=1, default=str))


def read_fields(folder: Path) -> dict[str, object]:
    fields: dict[str, object] = json.loads((folder / "config.json").read_text())
    return fields


def as_published(fields: Mapping[str, object]) -> dict[str, object]:
    """RoPE in the fields of transformers 4: rope_theta, rope_scaling with its `type` (Llama 3 and
    Gemma 3: `rope_type`), partial_rotary_factor; rope_local_base_freq for windows of Gemma 3."""
    old = {name: value for name, value in fields.items() if name != "rope_parameters"}
    parameters: dict[str, Any] = dict(fields["rope_parameters"])  # type: ignore[call-overload]
    rope = dict(parameters.get("full_attention", parameters))
    if "sliding_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    spelling = "rope_type" if kind == "llama3" or "sliding_attention" in parameters else "type"
    old["rope_scaling"] = None if kind == "default" else {spelling: kind, **rope}
    return old
