"""Writes tiny models as GGUF, as llama.cpp's converter does: names by the gguf package's tables,
rows of q and k of a Llama turned, 1 added to norms of Gemma, experts merged or each on its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from layersweep.checkpoint.storage.ggml import TYPES

Kind = gguf.GGMLQuantizationType
ARCHITECTURES = {
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
}  # fmt: skip


def convert(
    folder: Path,
    path: Path,
    *,
    merged: bool = True,
    more: Mapping[str, Any] | None = None,
    change: Callable[[str, Tensor], dict[str, Tensor]] = lambda name, tensor: {name: tensor},
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """The checkpoint in `folder` as float32, with `more` metadata and `extra` tensors; `change`:
    what becomes of each."""
    fields = json.loads((folder / "config.json").read_text())
    weights = {name: one.float() for name, one in load_file(folder / "model.safetensors").items()}
    architecture = ARCHITECTURES[fields["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**metadata(fields), **(more or {})}.items():
        put(writer, f"{architecture}.{name}", value)
    for name, tensor in {**tensors(fields, weights, merged), **(extra or {})}.items():
        for own, part in change(name, tensor).items():
            writer.add_tensor(own, part.contiguous().numpy())
    write(writer)
    return path


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    found = {
        "context_length": fields["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": fields["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": fields.get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": float(fields["rms_norm_eps"]),
        "rope.freq_base": float(full.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
    }
    optional = {
        "feed_forward_length": "intermediate_size",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }
    found |= {key: fields[name] for key, name in optional.items() if fields.get(name) is not None}
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if fields.get(name):
            found["expert_count"] = fields[name]
    kind = full.get("rope_type", full.get("type", "default"))
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        length = full.get("original_max_position_embeddings", fields["max_position_embeddings"])
        found["rope.scaling.original_context_length"] = length
        if full.get("mscale_all_dim"):
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * full["mscale_all_dim"]
    return found | of_family(fields)


def of_family(fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = fields["model_type"]
    window = {"attention.sliding_window": fields.get("sliding_window")}
    if kind.startswith("gemma"):
        return window
    if kind == "gpt_oss":
        return window | {"expert_feed_forward_length": fields["intermediate_size"]}
    if not kind.startswith("deepseek"):
        return {}
    size = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    found = {
        "attention.key_length": size,
        "attention.value_length": fields["v_head_dim"],
        "attention.kv_lora_rank": fields["kv_lora_rank"],
        "rope.dimension_count": fields["qk_rope_head_dim"],
        "expert_shared_count": fields["n_shared_experts"],
        "leading_dense_block_count": fields["first_k_dense_replace"],
        "expert_weights_scale": float(fields["routed_scaling_factor"]),
        "expert_weights_norm": bool(fields.get("norm_topk_prob")),
        "expert_gating_func": 2 if kind == "deepseek_v3" else 1,
    }
    if fields.get("q_lora_rank"):
        found["attention.q_lora_rank"] = fields["q_lora_rank"]
    if fields.get("n_group"):
        groups = {"expert_group_count": "n_group", "expert_group_used_count": "topk_group"}
        found |= {key: fields[name] for key, name in groups.items()}
    return found


def tensors(
    fields: Mapping[str, Any], weights: Mapping[str, Tensor], merged: bool = True
) -> dict[str, Tensor]:
    architecture = ARCHITECTURES[fields["model_type"]]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], fields["num_hidden_layers"])
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        if name.startswith("lm_head") and fields.get("tie_word_embeddings"):
            continue
        *path, last = name.split(".")
        if "experts" in path and path[-2].isdigit():  # one of several; they come in order
            at = path.index("experts")
            part = {"w1": "gate", "w2": "down", "w3": "up"}.get(path[-1], path[-1].split("_")[0])
            key = f"blk.{path[2]}.ffn_{part}"
            if merged:
                experts.setdefault(f"{key}_exps.{last}", []).append(tensor)
            else:
                found[f"{key}.{path[at + 1]}.{last}"] = tensor
        elif ".mlp.experts." in name:
            found |= gpt_oss_experts(path[2], path[-1] if last == "weight" else last, tensor)
        else:
            theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if name.endswith("sinks"):
                theirs = f"{theirs}.weight"
            elif name.endswith("e_score_correction_bias"):
                theirs = f"blk.{path[2]}.exp_probs_b.bias"
            assert theirs is not None, name
            found[theirs] = changed(fields, name, tensor)
    return found | {name: torch.stack(parts) for name, parts in experts.items()}


def gpt_oss_experts(layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Gates and ups take turns in columns of a transposed matrix."""
    end = "bias" if name.endswith("bias") else "weight"
    rows = tensor if end == "bias" else tensor.transpose(1, 2)
    if name.startswith("down"):
        return {f"blk.{layer}.ffn_down_exps.{end}": rows}
    return {
        f"blk.{layer}.ffn_{part}_exps.{end}": rows[:, first::2]
        for first, part in enumerate(("gate", "up"))
    }


def changed(fields: Mapping[str, Any], name: str, tensor: Tensor) -> Tensor:
    kind = fields["model_type"]
    if kind in ("llama", "mixtral") and (".q_proj." in name or ".k_proj." in name):
        heads = fields["num_attention_heads"]
        if ".k_proj." in name:
            heads = fields.get("num_key_value_heads", heads)
        return turned(tensor, heads)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def turned(tensor: Tensor, heads: int) -> Tensor:
    rest = tensor.shape[1:]
    return tensor.view(heads, 2, -1, *rest).transpose(1, 2).reshape(tensor.shape)


def halves(tensor: Tensor, heads: int) -> Tensor:
    """What `turned` does, undone."""
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def random_blocks(kind: str, rows: int, columns: int, drawn: np.random.Generator) -> np.ndarray:
    """A matrix of any bits with a standard deviation of about 0.1, as bytes of a type."""
    if kind in ("F16", "BF16"):
        dense = drawn.normal(scale=0.1, size=(rows, columns)).astype(np.float32)
        return np.asarray(gguf.quantize(dense, Kind[kind]))
    of = TYPES[kind]
    data = drawn.integers(0, 256, (rows, columns // of.elements, of.nbytes), dtype=np.uint8)
    if of.powers:
        data[..., 0] = 123
    scale = 1.0
    for _ in range(2):  # the second time with the scale that the first one asks for
        for first in of.halves:
            halves = np.full((*data.shape[:2], 1), scale, np.float16)
            data[..., first : first + 2] = halves.view(np.uint8)
        scale = 0.1 / float(gguf.dequantize(data.reshape(rows, -1), Kind[kind]).std())
    return data.reshape(rows, -1)
