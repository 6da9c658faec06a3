"""Synthetic checkpoints: random weights in the published NF4 layout, at full size and disk speed.

For measuring speed and memory where no real checkpoint can be had. config.json carries
`layersweep_synthetic`, so no result of such a model is ever called publishable.

Scales: a matrix with n inputs has standard deviation 1 / sqrt(n), those that write into the
residual stream 1 / sqrt(2 L n) for L layers, so hidden states stay near 1 in fp16 whatever the
depth; router logits get a standard deviation of about 1, so that tokens go to all experts.
Packed bytes are uniform: the 16 levels of NF4 are equally likely.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.config import ModelConfig
from layersweep.checkpoint.layout import demo_folder
from layersweep.errors import InputError
from layersweep.units import format_bytes

POOL_BYTES = 64 * 2**20
SHARD_BYTES = 4_900_000_000
NESTED_SPREAD = 0.1  # scales of a weight vary by up to this share
LEVELS_STD = float(torch.tensor(nf4.NF4_CODE).square().mean().sqrt())

MIXTRAL_8X7B = ModelConfig(
    architecture="MixtralForCausalLM", vocab_size=32_000, hidden_size=4096,
    intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2,
    rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32_768, sliding_window=None,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, synthetic=True,
)  # fmt: skip
SHAPES = {"mixtral-8x7b": MIXTRAL_8X7B}


@dataclass(frozen=True)
class Pool:
    """Random bytes, cut at random places: drawing 24 GB afresh would take longer than writing."""

    data: Tensor
    generator: torch.Generator

    @classmethod
    def draw(cls, seed: int) -> Pool:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(
            torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, (POOL_BYTES // 8,),
            generator=generator,
        )  # fmt: skip
        return cls(words.view(torch.uint8), generator)

    def take(self, count: int) -> Tensor:
        """`count` bytes: the pool from a random place on, around as often as it takes."""
        start = int(torch.randint(POOL_BYTES, (1,), generator=self.generator))
        out = torch.empty(count, dtype=torch.uint8)
        filled = 0
        while filled < count:
            piece = self.data[start : start + count - filled]
            out[filled : filled + piece.numel()] = piece
            filled, start = filled + piece.numel(), 0
        return out


def write_synthetic(
    folder: Path, config: ModelConfig, *, seed: int = 0, shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> int:  # fmt: skip
    """Write the checkpoint; returns its weight bytes. `folder` is made; it must hold no model.

    Raises InputError for a folder in use, one that cannot be made, or a disk that is too small.
    """
    _check_folder(folder, config)
    from safetensors.torch import save_file

    pool = Pool.draw(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = held = number = 0
    parts = config.num_hidden_layers + 1

    def flush() -> None:
        nonlocal shard, held, number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, held = {}, 0

    for done, tensors in enumerate(_parts(config, pool)):
        for name, tensor in tensors:
            if held and held + tensor.nbytes > shard_bytes:
                flush()
            shard[name] = tensor
            held += tensor.nbytes
            total += tensor.nbytes
        progress("writing", done + 1, parts)
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(_config_json(config), indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_folder() / name, folder / name)
    return total


def _check_folder(folder: Path, config: ModelConfig) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: found a file, needed a folder", hint="name another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: found files in it, needed an empty folder",
                         hint="name a folder that does not exist yet")  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as failure:
        raise InputError(f"{folder}: cannot be made ({failure.strerror})",
                         hint="name a folder that you may write to") from failure  # fmt: skip
    needed = synthetic_bytes(config)
    if free < needed:
        raise InputError(
            f"{folder}: found {format_bytes(free)} of free disk, needed {format_bytes(needed)}",
            hint="name a folder on a larger disk, or fewer --layers",
        )


def synthetic_bytes(config: ModelConfig) -> int:
    """About the bytes that will be written: half a byte per packed element and 3 % of scales."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * heads + 2 * kv + config.num_local_experts)
    layer += 3 * config.num_local_experts * hidden * inner
    dense = 2 * 2 * config.vocab_size * hidden
    return int(0.516 * layer * config.num_hidden_layers) + dense


def _parts(config: ModelConfig, pool: Pool) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Named tensors of each layer, then of embedding, norm and head."""
    for layer in range(config.num_hidden_layers):
        yield _layer(config, pool, f"model.layers.{layer}")
    yield _ends(config, pool)


def _layer(config: ModelConfig, pool: Pool, at: str) -> Iterator[tuple[str, Tensor]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    into_residual = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", torch.ones(hidden, dtype=torch.float16)
    for name, rows, columns, gain in (
        ("q_proj", heads, hidden, 1.0), ("k_proj", kv, hidden, 1.0), ("v_proj", kv, hidden, 1.0),
        ("o_proj", hidden, heads, into_residual),
    ):  # fmt: skip
        yield from _packed(f"{at}.self_attn.{name}.weight", rows, columns, gain, pool)
    moe = f"{at}.block_sparse_moe"
    yield from _packed(f"{moe}.gate.weight", config.num_local_experts, hidden, 1.0, pool)
    for expert in range(config.num_local_experts):
        for name, rows, columns, gain in (
            ("w1", inner, hidden, 1.0), ("w2", hidden, inner, into_residual),
            ("w3", inner, hidden, 1.0),
        ):  # fmt: skip
            yield from _packed(f"{moe}.experts.{expert}.{name}.weight", rows, columns, gain, pool)


def _ends(config: ModelConfig, pool: Pool) -> Iterator[tuple[str, Tensor]]:
    shape = (config.vocab_size, config.hidden_size)
    for name, std in (("model.embed_tokens", 1.0), ("lm_head", 1.0 / math.sqrt(shape[1]))):
        weight = torch.randn(shape, generator=pool.generator).mul_(std)
        yield f"{name}.weight", weight.to(torch.float16)
    yield "model.norm.weight", torch.ones(shape[1], dtype=torch.float16)


def _packed(
    name: str, rows: int, columns: int, gain: float, pool: Pool
) -> Iterator[tuple[str, Tensor]]:
    """The published tensors of a random matrix with standard deviation gain / sqrt(columns)."""
    elements = rows * columns
    blocks = -(-elements // 64)
    scale = gain / math.sqrt(columns) / LEVELS_STD
    groups = -(-blocks // nf4.NESTED_BLOCKSIZE)
    nested = nf4.NestedScales(
        torch.full((groups,), NESTED_SPREAD * scale), nf4.dynamic_map(), nf4.NESTED_BLOCKSIZE, scale
    )
    quantized = nf4.QuantizedTensor(pool.take((elements + 1) // 2), pool.take(blocks), 64, nested)
    tensors = nf4.to_tensors(name, quantized, torch.float16, (rows, columns))
    return iter(tensors.items())


def _config_json(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": [config.architecture],
        "model_type": "mixtral",
        "layersweep_synthetic": True,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float16",
        },
    }
