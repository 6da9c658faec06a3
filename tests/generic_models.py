"""Small random decoders of any model type in folders, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families.weights import randomize
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersweep.sweep import model as opening
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model
from layersweep.sweep.record import Pieces, SweepRecord, joined
from layersweep.sweep.sequences import BranchedSequence, Tile

SMALL: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "moe_intermediate_size": 48, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1, "n_positions": 512,
    "n_embd": 64, "n_layer": 4, "n_head": 4,
}  # fmt: skip


def small_config(kind: str, **fields: Any) -> PreTrainedConfig:
    """A config of a model_type with small sizes, `fields` as given. Skips the test where the
    installed transformers does not have it yet."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    of = CONFIG_MAPPING[kind]
    known = {*vars(of()), *of.attribute_map}
    sizes = {key: size for key, size in SMALL.items() if key in known}
    return of(**{**sizes, **fields})


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model with weights under which everything matters; float32, eager."""
    model = AutoModelForCausalLM.from_config(
        type(config).from_dict(config.to_dict()), attn_implementation="eager", dtype=torch.float32
    )
    randomize(model)
    return model.eval()


def saved(model: PreTrainedModel, folder: Path, config: PreTrainedConfig | None = None) -> Path:
    """The folder that transformers writes of a model; with another config in it, where given."""
    model.save_pretrained(folder)
    if config is not None:
        config.architectures = model.config.architectures
        config.save_pretrained(folder)
    return folder


def opened(folder: Path, *, program: str = "generic", weights: str = "auto") -> Model:
    """By transformers' own layers, whether or not this package knows the family."""
    return opening.load(
        str(folder), device="cpu", vram="1GiB", ram="1GiB", program=program, weights=weights
    )


def swept(model: Model, tiles: list[Tile]) -> tuple[list[list[list[Tensor]]], SweepRecord]:
    """Logits by tile, sequence and branch, and what the sweep recorded."""
    found: list[list[list[Tensor]]] = [[] for _ in tiles]

    def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        found[tiles.index(tile)].append(joined(pieces))

    plan = model.plan(tiles)
    engine = model.open(plan)
    try:
        record = run_sweep(engine, tiles, read)
    finally:
        engine.close()
    return found, record


def difference(model: PreTrainedModel, tiles: list[Tile], found: list[list[list[Tensor]]]) -> float:
    """Largest difference of a branch's logits to transformers' plain forward of prefix + branch, in
    standard deviations of its logits."""
    worst = 0.0
    for tile, of_tile in zip(tiles, found, strict=True):
        for sequence, of_sequence in zip(tile.sequences, of_tile, strict=True):
            for branch, logits in zip(sequence.branches, of_sequence, strict=True):
                whole = torch.tensor([sequence.prefix + branch.ids])
                with torch.inference_mode():
                    wanted = model(whole, use_cache=False).logits[0, len(sequence.prefix) :]
                wanted = wanted[slice(*branch.read)]
                worst = max(worst, float((logits - wanted).abs().max() / wanted.std()))
    return worst
