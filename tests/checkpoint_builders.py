"""Tiny random Mixtrals in every layout that can be read, and their dense weights.

Nothing here uses layersweep: 4-bit tensors are written and read with a scalar-minded codec of
their own, so that a mistake in the package cannot hide in its test data.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, FFN, LAYERS, EXPERTS, HEADS, KV_HEADS, HEAD_DIM = 128, 64, 96, 2, 4, 4, 2, 16
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
STATE = ".quant_state.bitsandbytes__nf4"


def tiny_config() -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_position_embeddings": 512,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tiny_checkpoint(
    folder: Path,
    layout: str = "per_expert",
    weights: str = "nf4",
    nested: bool = True,
    router: str = "nf4",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A random Mixtral in `folder`.

    layout: "per_expert" (block_sparse_moe, w1/w2/w3), "gate_proj" (mlp.experts.E.gate_proj) or
    "fused" (3-D). weights: "nf4", "bf16", "f16", "f32", or "mixed" (attention NF4,
    experts bf16). router "nf4" is packed where weights are "nf4" or "mixed", "float" is not.
    """
    dense = random_weights(seed)
    if layout == "fused":
        dense = fuse(dense)
    stored: dict[str, Tensor] = {}
    for name, weight in dense.items():
        kind = storage_of(name, weights, router)
        if kind == "nf4":
            stored.update(pack(name, weight, nested))
        else:
            stored[name] = weight.to(DTYPES[kind])
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, rename(stored, layout), shards)
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    return folder


def random_weights(seed: int) -> dict[str, Tensor]:
    """f32, per-expert names; norms near one, matrices scaled to keep activations near one."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        noise = torch.randn(rows, columns, generator=generator)
        return noise * gain / math.sqrt(columns)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, generator=generator)

    dense = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 8.0)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        dense[f"{prefix}.input_layernorm.weight"] = norm()
        dense[f"{prefix}.post_attention_layernorm.weight"] = norm()
        attention = f"{prefix}.self_attn"
        dense[f"{attention}.q_proj.weight"] = matrix(HEADS * HEAD_DIM, HIDDEN)
        dense[f"{attention}.k_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        dense[f"{attention}.v_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        dense[f"{attention}.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        moe = f"{prefix}.block_sparse_moe"
        dense[f"{moe}.gate.weight"] = matrix(EXPERTS, HIDDEN, 2.0)
        for expert in range(EXPERTS):
            dense[f"{moe}.experts.{expert}.w1.weight"] = matrix(FFN, HIDDEN)
            dense[f"{moe}.experts.{expert}.w2.weight"] = matrix(HIDDEN, FFN)
            dense[f"{moe}.experts.{expert}.w3.weight"] = matrix(FFN, HIDDEN)
    dense["model.norm.weight"] = norm()
    dense["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    return dense


def storage_of(name: str, weights: str, router: str) -> str:
    if weights in DTYPES:
        return weights
    if "norm" in name or "embed" in name or "lm_head" in name:
        return "bf16"
    if ".gate.weight" in name:
        return "nf4" if router == "nf4" else "f16"
    return "bf16" if weights == "mixed" and "experts" in name else "nf4"


def pack(name: str, weight: Tensor, nested: bool, blocksize: int = 64) -> dict[str, Tensor]:
    """NF4 tensors of one weight, by nearest level; nested scales on a plain linear table."""
    flat = weight.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS)
    nearest = _nearest(blocks / scales.clamp(min=1e-30)[:, None], levels)
    nibbles = nearest.reshape(-1)[: len(flat) + len(flat) % 2].to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16"}
    state["shape"] = list(weight.shape)
    tensors = {name: (nibbles[0::2] * 16 + nibbles[1::2]).view(-1, 1)}
    tensors[f"{name}.quant_map"] = levels
    if nested:
        offset = float(scales.mean())
        rest = torch.nn.functional.pad(scales - offset, (0, -len(scales) % 256)).view(-1, 256)
        outer = rest.abs().amax(1).clamp(min=1e-30)
        table = torch.linspace(-1, 1, 256)
        codes = _nearest(rest / outer[:, None], table).reshape(-1)
        tensors[f"{name}.absmax"] = codes[: len(scales)].to(torch.uint8)
        tensors[f"{name}.nested_absmax"] = outer
        tensors[f"{name}.nested_quant_map"] = table
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors[f"{name}.absmax"] = scales
    tensors[name + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def _nearest(values: Tensor, ascending: Tensor) -> Tensor:
    return torch.bucketize(values, (ascending[1:] + ascending[:-1]) / 2)


def unpack(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The dense f32 weight of the NF4 tensors that `pack` or bitsandbytes wrote."""
    state = json.loads(bytes(tensors[name + STATE].tolist()))
    scales = tensors[f"{name}.absmax"]
    if "nested_offset" in state:
        outer = tensors[f"{name}.nested_absmax"]
        owner = torch.arange(len(scales)) // state["nested_blocksize"]
        scales = tensors[f"{name}.nested_quant_map"][scales.long()] * outer[owner]
        scales = scales + torch.tensor(state["nested_offset"], dtype=torch.float32)
    packed = tensors[name].contiguous().view(torch.uint8).reshape(-1).long()
    nibbles = torch.stack([packed // 16, packed % 16], dim=1).reshape(-1)
    nibbles = nibbles[: math.prod(state["shape"])]
    owner = torch.arange(len(nibbles)) // state["blocksize"]
    return (torch.tensor(LEVELS)[nibbles] * scales[owner]).view(state["shape"])


def rename(stored: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Per-expert names to those of `layout` (fused tensors have theirs)."""
    if layout != "gate_proj":
        return stored
    parts = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    renamed = {}
    for name, tensor in stored.items():
        new = name.replace("block_sparse_moe", "mlp")
        for old, part in parts.items():
            new = new.replace(old, part)
        renamed[new] = tensor
    return renamed


def fuse(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense experts stacked as transformers 5 has them: [E, 2I, H] with w1 first, and [E, H, I]."""
    fused = {
        name.replace("block_sparse_moe", "mlp"): tensor
        for name, tensor in stored.items()
        if ".experts." not in name
    }
    for layer in range(LAYERS):
        old = f"model.layers.{layer}.block_sparse_moe.experts"

        def part(expert: int, which: str, old: str = old) -> Tensor:
            return stored[f"{old}.{expert}.{which}.weight"]

        new = f"model.layers.{layer}.mlp.experts"
        up = [torch.cat([part(e, "w1"), part(e, "w3")]) for e in range(EXPERTS)]
        fused[f"{new}.gate_up_proj"] = torch.stack(up)
        fused[f"{new}.down_proj"] = torch.stack([part(e, "w2") for e in range(EXPERTS)])
    return fused


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """model.safetensors, or `shards` files with an index, companions dealt to other shards."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {
        name: f"model-{1 + number % shards:05d}-of-{shards:05d}.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    for shard in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensors[name] = opened.get_tensor(name)
    return tensors


def dequantized_state_dict(folder: Path) -> dict[str, Tensor]:
    """Every weight of a checkpoint in f32 under transformers 5's MixtralForCausalLM names."""
    tensors = read_tensors(Path(folder))
    config = json.loads((Path(folder) / "config.json").read_text())
    companions = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
    dense = {
        name: unpack(name, tensors) if name + STATE in tensors else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith(companions)
    }
    if any(name.endswith("gate_up_proj") for name in dense):
        return dense
    result = {}
    for name, tensor in dense.items():
        if ".experts." not in name:
            result[name.replace("block_sparse_moe", "mlp")] = tensor
    for layer in range(config["num_hidden_layers"]):
        result.update(_stacked(dense, layer, config["num_local_experts"]))
    return result


def _stacked(dense: dict[str, Tensor], layer: int, experts: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}"

    def part(expert: int, old: str, new: str) -> Tensor:
        published = f"{prefix}.block_sparse_moe.experts.{expert}.{old}.weight"
        other = f"{prefix}.mlp.experts.{expert}.{new}.weight"
        return dense[published] if published in dense else dense[other]

    up = [torch.cat([part(e, "w1", "gate_proj"), part(e, "w3", "up_proj")]) for e in range(experts)]
    down = [part(e, "w2", "down_proj") for e in range(experts)]
    return {
        f"{prefix}.mlp.experts.gate_up_proj": torch.stack(up),
        f"{prefix}.mlp.experts.down_proj": torch.stack(down),
    }
