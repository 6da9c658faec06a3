"""A sweep of transformers' layers over plain state dicts: the engine's loop at its smallest."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from layersweep.sweep.foreign import TileRows, tile_positions
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layersweep.model.generic.decoder import Decoder
from layersweep.model.generic.experts import ExpertSums
from layersweep.model.generic.walk import AtExperts, AtLayer, Done, Halt, Walk
from layersweep.sweep.sequences import Tile

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
    """A config of a model_type with small sizes, `fields` as given."""
    of = CONFIG_MAPPING[kind]
    known = {*vars(of()), *of.attribute_map}
    sizes = {key: size for key, size in SMALL.items() if key in known}
    return of(**{**sizes, **fields})


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model with weights that make peaked, different logits; float32, eager."""
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
    ).eval()
    seed = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=seed)
            if parameter.ndim >= 2:
                parameter.copy_(drawn * 1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * drawn)
    return model


def sweep(
    decoder: Decoder, weights: Mapping[str, Tensor], tiles: list[Tile], bits: Any = None
) -> list[Tensor]:
    """Logits of all rows of each tile, [rows, V]; one layer at a time, one expert at a time."""
    modules = dict(decoder.model.named_modules())
    sites = {
        modules[site.module]: (index, site)
        for index, layer in enumerate(decoder.layers)
        for site in layer.attention
    }
    experts = {name for layer in decoder.layers for name in layer.experts}

    def dense(prefix: str) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in weights.items()
            if name.startswith(f"{prefix}.") and name.rpartition(".")[0] not in experts
        }

    of_layers = [dense(layer.module) for layer in decoder.layers]
    base = {name: x for name, x in weights.items() if not any(name in of for of in of_layers)}
    base = {name: x for name, x in base.items() if name.rpartition(".")[0] not in experts}
    more = {} if bits is None else {"count": bits}
    with torch.inference_mode(), ExitStack() as leave:
        leave.enter_context(decoder.bound(base))
        walks = []
        for tile in tiles:
            rows = TileRows(tile, tile.groups(8), sites, len(decoder.layers), **more)
            ids = torch.from_numpy(tile.ids())
            walk = decoder.walk(ids, tile_positions(tile), rows.attend, rows.by_sequence)
            leave.callback(walk.close)
            walks.append(walk)
        halts = [walk.go() for walk in walks]
        for index, own in enumerate(of_layers):
            assert halts == [AtLayer(index)] * len(walks)
            with decoder.bound(own):
                halts = _through_layer(walks, weights, modules)
        assert halts == [AtLayer(len(of_layers))] * len(walks)
        last = [walk.go() for walk in walks]
        return [decoder.logits(halt.hidden_NH) for halt in last if isinstance(halt, Done)]


def _through_layer(
    walks: list[Walk], weights: Mapping[str, Tensor], modules: Mapping[str, torch.nn.Module]
) -> list[Halt]:
    halts = [walk.go() for walk in walks]
    while isinstance(halts[0], AtExperts):
        waiting = [halt for halt in halts if isinstance(halt, AtExperts)]
        module = waiting[0].module
        (name,) = [key for key, value in modules.items() if value is module]
        sums = [ExpertSums.of(halt, module.num_experts) for halt in waiting]
        for expert in range(module.num_experts):
            one = {
                key: weights[f"{name}.{key}"][expert]
                for key, parameter in module.named_parameters(recurse=False)
                if parameter.ndim > 1
            }
            for tile in sums:
                tile.add(expert, module, one)
        halts = [walk.go(tile.sums_NH) for walk, tile in zip(walks, sums, strict=True)]
    return halts
