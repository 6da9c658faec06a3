"""Synthetic checkpoints: random weights in the published NF4 layout, at full size and disk speed.

For measuring speed and memory where no real checkpoint can be had. config.json carries
`layersweep_synthetic`, so no result of such a model is ever called publishable.

Scales: a matrix with n inputs has standard deviation 1 / sqrt(n), those that write into the
residual stream 1 / sqrt(2 L n) for L layers, so hidden states stay near 1 in fp16 whatever the
depth; router logits get a standard deviation of about 1, so that tokens go to all experts.
The levels of NF4 are drawn so that their mean is 0. Equally likely levels have a mean of 0.023:
in a matrix of 4096 columns that is a rank-one part larger than all the noise, every token is
pulled into its direction, and from layer 14 on two experts get them all.

Every tensor is planned first, shape and place in the pool, and then written from where its bytes
lie: 24 GB pass through no memory but the page cache.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from layersweep.checkpoint import nf4
from layersweep.checkpoint.config import ModelConfig
from layersweep.checkpoint.layout import demo_folder
from layersweep.checkpoint.writer import (
    Pieces,
    PlannedTensor,
    bytes_of,
    cut_shards,
    make_folder,
    write_shards,
)
from layersweep.errors import InputError

POOL_BYTES = 64 * 2**20
NORMAL_PIECE = 2**20  # values drawn at once
SHARD_BYTES = 4_900_000_000
NESTED_SPREAD = 0.1  # scales of a weight vary by up to this share

MIXTRAL_8X7B = ModelConfig(
    architecture="MixtralForCausalLM", vocab_size=32_000, hidden_size=4096,
    intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, num_local_experts=8, num_experts_per_tok=2,
    rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32_768, sliding_window=None,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, synthetic=True,
)  # fmt: skip
SHAPES = {"mixtral-8x7b": MIXTRAL_8X7B}
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("model.safetensors.index.json", "config.json"),
)


def _level_counts() -> list[int]:
    """How many of 256 random bytes become each level: p ~ exp(-tilt x level), whose mean is 0."""
    levels = np.array(nf4.NF4_CODE)
    low, high = 0.0, 10.0
    for _ in range(60):
        tilt = (low + high) / 2
        share = np.exp(-tilt * levels)
        low, high = (tilt, high) if (share * levels).sum() > 0 else (low, tilt)
    ends = np.round(256 * np.cumsum(share) / share.sum()).astype(int)
    return [int(count) for count in np.diff(ends, prepend=0)]


LEVEL_COUNTS = _level_counts()
LEVELS_STD = math.sqrt(
    sum(n * x * x for n, x in zip(LEVEL_COUNTS, nf4.NF4_CODE, strict=True)) / 256
)


@dataclass(frozen=True)
class Pool:
    """Random bytes, cut at random places: drawing 24 GB afresh would take longer than writing."""

    data: memoryview
    generator: torch.Generator

    @classmethod
    def draw(cls, seed: int) -> Pool:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(
            torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, (POOL_BYTES // 4,),
            generator=generator,
        )  # fmt: skip
        level = np.repeat(np.arange(16, dtype=np.uint8), LEVEL_COUNTS)
        pairs = (level[:, None] << 4 | level).reshape(-1)  # two random bytes -> two nibbles
        packed = pairs[words.numpy().view(np.uint16)]
        return cls(packed.data, generator)

    def seed(self) -> int:
        """For a generator of its own, of what is drawn while it is written."""
        return int(torch.randint(2**62, (1,), generator=self.generator))

    def take(self, count: int) -> Pieces:
        """`count` bytes: the pool from a random place on, around as often as it takes.

        The place is drawn now, so that it does not depend on who writes when; nothing is copied.
        """
        first = int(torch.randint(POOL_BYTES, (1,), generator=self.generator))

        def pieces() -> Iterator[memoryview]:
            start, left = first, count
            while left:
                piece = self.data[start : start + left]
                yield piece
                start, left = 0, left - len(piece)

        return pieces


def write_synthetic(
    folder: Path, config: ModelConfig, *, seed: int = 0, shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> int:  # fmt: skip
    """Write the checkpoint; returns its weight bytes. `folder` is made; it must hold no model.

    The bytes depend on `config`, `seed` and `shard_bytes` alone. config.json comes last, so a
    folder that was left early opens nowhere; what was written is taken away again if it fails.
    Raises InputError for a folder in use, one that cannot be made, or a disk that is too small.
    """
    hint = "name a folder on a larger disk, or fewer --layers"
    make_folder(folder, synthetic_bytes(config), hint)
    shards = cut_shards(_tensors(config, Pool.draw(seed)), shard_bytes)
    files = {f"model-{number:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
    total = sum(tensor.like.nbytes for shard in shards for tensor in shard)
    parts = config.num_hidden_layers + 1

    def report(written: int) -> None:
        progress("writing", written * parts // total, parts)

    try:
        write_shards(folder, files, threads or os.cpu_count() or 1, report)
        _write_beside(folder, config, total, files)
    except BaseException as failure:
        for name in (*files, *BESIDE):
            (folder / name).unlink(missing_ok=True)
        if isinstance(failure, OSError):
            raise InputError(f"{folder}: cannot be written ({failure.strerror})",
                             hint="name a folder on a larger disk") from failure  # fmt: skip
        raise
    return total


def _write_beside(
    folder: Path, config: ModelConfig, total: int, files: Mapping[str, list[PlannedTensor]]
) -> None:
    """Tokenizer, index and, last, the file without which nothing opens the folder."""
    for name in BESIDE[:2]:
        shutil.copyfile(demo_folder() / name, folder / name)
    weight_map = {tensor.name: name for name, shard in files.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, fields in zip(BESIDE[2:], (index, _config_json(config)), strict=True):
        (folder / name).write_text(json.dumps(fields, indent=1) + "\n")


def synthetic_bytes(config: ModelConfig) -> int:
    """About the bytes that will be written: half a byte per packed element and 3 % of scales."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * heads + 2 * kv + config.num_local_experts)
    layer += 3 * config.num_local_experts * hidden * inner
    dense = 2 * 2 * config.vocab_size * hidden
    return int(0.516 * layer * config.num_hidden_layers) + dense


def _tensors(config: ModelConfig, pool: Pool) -> Iterator[PlannedTensor]:
    """Every tensor in the order of layers, then embedding, head and norm."""
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, pool, f"model.layers.{layer}")
    columns = config.hidden_size
    for name, std in (("model.embed_tokens", 1.0), ("lm_head", 1.0 / math.sqrt(columns))):
        like = torch.empty(config.vocab_size, columns, dtype=torch.float16, device="meta")
        yield PlannedTensor(f"{name}.weight", like, _normal(like.numel(), std, pool.seed()))
    yield PlannedTensor.of("model.norm.weight", torch.ones(columns, dtype=torch.float16))


def _layer(config: ModelConfig, pool: Pool, at: str) -> Iterator[PlannedTensor]:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    into_residual = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield PlannedTensor.of(f"{at}.{name}.weight", torch.ones(hidden, dtype=torch.float16))
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


def _normal(count: int, std: float, seed: int) -> Pieces:
    """Normal values in float16, drawn a piece at a time by a generator of this tensor's own."""

    def pieces() -> Iterator[memoryview]:
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, count, NORMAL_PIECE):
            size = min(NORMAL_PIECE, count - start)
            yield bytes_of(torch.randn(size, generator=generator).mul_(std).to(torch.float16))

    return pieces


def _packed(name: str, rows: int, columns: int, gain: float, pool: Pool) -> Iterator[PlannedTensor]:
    """The published tensors of a random matrix with standard deviation gain / sqrt(columns)."""
    elements = rows * columns
    blocks = -(-elements // 64)
    scale = gain / math.sqrt(columns) / LEVELS_STD
    groups = -(-blocks // nf4.NESTED_BLOCKSIZE)
    nested = nf4.NestedScales(
        torch.full((groups,), NESTED_SPREAD * scale), nf4.dynamic_map(), nf4.NESTED_BLOCKSIZE, scale
    )
    sizes = ((elements + 1) // 2, blocks)
    packed, absmax = (torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes)
    quantized = nf4.QuantizedTensor(packed, absmax, 64, nested)
    for part, tensor in nf4.to_tensors(name, quantized, torch.float16, (rows, columns)).items():
        if tensor.is_meta:
            yield PlannedTensor(part, tensor, pool.take(tensor.nbytes))
        else:
            yield PlannedTensor.of(part, tensor)


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
