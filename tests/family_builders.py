"""Small configurations of families, and checkpoints with a tensor for each of their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from layersweep.families.names import LAYERS
from layersweep.families.registry import Description, describe
from layersweep.families.spec import Decoder
from layersweep.families.weights import embed_block, head_block

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
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


def described(model_type: str, fields: Mapping[str, object] = SMALL, **more: object) -> Description:
    return describe({**fields, "model_type": model_type, **more}, "config.json")


def decoder_of(model_type: str, fields: Mapping[str, object] = SMALL, **more: object) -> Decoder:
    found = described(model_type, fields, **more)
    assert found.problems == []
    assert found.decoder is not None
    return found.decoder


def tensors_of(
    model_type: str, fields: Mapping[str, object], *, fused: bool = False
) -> dict[str, Tensor]:
    """A tensor of zeros for every weight, under its published name; `fused`: those that the family
    has for several weights at once."""
    found = described(model_type, fields)
    assert found.decoder is not None and found.names is not None
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (embed_block(found.decoder), head_block(found.decoder)):
        shapes |= {one.bases[0]: one.shape for one in found.names.block(block)}
    for index in range(found.decoder.num_hidden_layers):
        wholes = found.names.wholes if fused else ()
        there = {f"{LAYERS}{index}.{whole.spellings[0]}": None for whole in wholes}
        wants = found.names.layer(found.decoder, index, there)
        shapes |= {one.bases[0]: one.shape for one in (*wants.single, *wants.fused)}
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def written(folder: Path, fields: Mapping[str, object], tensors: dict[str, Tensor]) -> str:
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)
