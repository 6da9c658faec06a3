"""Tables of families without weights: defaults beside transformers' own, published spellings of
config.json, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layersweep.families.family import Family
from layersweep.families.registry import FAMILIES, Description, describe
from layersweep.families.spec import Decoder
from layersweep.families.weights import layer_blocks
from layersweep.problems import Problem

SMALL: Mapping[str, object] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
GLM_MOE: Mapping[str, object] = {
    **SMALL, "model_type": "glm4_moe", "moe_intermediate_size": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: Mapping[str, object] = {
    **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": None,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def described(model_type: str, fields: Mapping[str, object] = SMALL, **more: object) -> Description:
    return describe({**fields, "model_type": model_type, **more}, "config.json")


def decoder_of(model_type: str, fields: Mapping[str, object] = SMALL, **more: object) -> Decoder:
    found = described(model_type, fields, **more)
    assert found.problems == []
    assert found.decoder is not None
    return found.decoder


def complaint(model_type: str, fields: Mapping[str, object] = SMALL, **more: object) -> str:
    return "\n".join(f"{one.found}, needed {one.needed}" for one in _problems(model_type, fields, more))


def _problems(
    model_type: str, fields: Mapping[str, object], more: Mapping[str, object]
) -> list[Problem]:
    return described(model_type, fields, **more).problems


SIZES = {
    "vocab_size": 64, "hidden_size": 1536, "intermediate_size": 24, "num_hidden_layers": 7,
    "num_attention_heads": 128, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(family: Family) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type] == family.architecture
    whole = CONFIG_MAPPING[family.model_type](**SIZES).to_dict()
    assert decoder_of(family.model_type, SIZES) == decoder_of(family.model_type, whole)
