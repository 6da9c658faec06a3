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
from layersweep.checkpoint.layout import demo_folder
from layersweep.checkpoint.synth_shapes import PublishedShape
from layersweep.checkpoint.writer import (
    Pieces,
    PlannedTensor,
    bytes_of,
    cut_shards,
    make_folder,
    write_shards,
)
from layersweep.errors import InputError
from layersweep.families.weights import BlockShape, blocks

POOL_BYTES = 64 * 2**20
NORMAL_PIECE = 2**20  # values drawn at once
SHARD_BYTES = 4_900_000_000
SMALL = 0.02  # standard deviation of biases, sinks and corrections
NESTED_SPREAD = 0.1  # scales of a weight vary by up to this share

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
    folder: Path, shape: PublishedShape, *, seed: int = 0, shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> int:  # fmt: skip
    """Write the checkpoint; returns its weight bytes. `folder` is made; it must hold no model.

    The bytes depend on `shape`, `seed` and `shard_bytes` alone. config.json comes last, so a
    folder that was left early opens nowhere; what was written is taken away again if it fails.
    Raises InputError for a folder in use, one that cannot be made, or a disk that is too small.
    """
    hint = "name a folder on a larger disk, or fewer --layers"
    make_folder(folder, synthetic_bytes(shape), hint)
    shards = cut_shards(_tensors(shape, Pool.draw(seed)), shard_bytes)
    files = {f"model-{number:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
    total = sum(tensor.like.nbytes for shard in shards for tensor in shard)
    parts = shape.decoder.num_hidden_layers + 1

    def report(written: int) -> None:
        progress("writing", written * parts // total, parts)

    try:
        write_shards(folder, files, threads or os.cpu_count() or 1, report)
        _write_beside(folder, shape, total, files)
    except BaseException as failure:
        for name in (*files, *BESIDE):
            (folder / name).unlink(missing_ok=True)
        if isinstance(failure, OSError):
            raise InputError(f"{folder}: cannot be written ({failure.strerror})",
                             hint="name a folder on a larger disk") from failure  # fmt: skip
        raise
    return total


def _write_beside(
    folder: Path, shape: PublishedShape, total: int, files: Mapping[str, list[PlannedTensor]]
) -> None:
    """Tokenizer, index and, last, the file without which nothing opens the folder."""
    for name in BESIDE[:2]:
        shutil.copyfile(demo_folder() / name, folder / name)
    weight_map = {tensor.name: name for name, shard in files.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, fields in zip(BESIDE[2:], (index, shape.config_json()), strict=True):
        (folder / name).write_text(json.dumps(fields, indent=1) + "\n")


def synthetic_bytes(shape: PublishedShape) -> int:
    """About the bytes that will be written: half a byte per packed element and 3 % of scales."""
    packed = float_elements = 0
    for block in blocks(shape.decoder):
        for key, size in block.weights.items():
            if shape.packs(block, key):
                packed += math.prod(size)
            elif key != "lm_head" or not shape.decoder.tie_word_embeddings:
                float_elements += math.prod(size)
    return int(0.516 * packed) + 2 * float_elements


def _tensors(shape: PublishedShape, pool: Pool) -> Iterator[PlannedTensor]:
    """Every tensor in the order of layers, then embedding, norm and head."""
    found = list(blocks(shape.decoder))
    for block in [*found[1:-1], found[0], found[-1]]:
        for key, size in block.weights.items():
            if key == "lm_head" and shape.decoder.tie_word_embeddings:
                continue
            yield from _weight(shape, block, key, size, pool)


def _weight(
    shape: PublishedShape, block: BlockShape, key: str, size: tuple[int, ...], pool: Pool
) -> Iterator[PlannedTensor]:
    """A matrix as its file has it; norms that scale by 1; biases and the like small."""
    name, decoder = shape.stored_name(block, key), shape.decoder
    into_residual = key in ("o_proj", "down_proj")
    gain = 1.0 / math.sqrt(2 * decoder.num_hidden_layers) if into_residual else 1.0
    if shape.packs(block, key):
        rows, columns = size
        yield from _packed(name, rows, columns, gain, pool)
        return
    like = torch.empty(size, dtype=torch.float16, device="meta")
    if key.endswith("norm"):
        weight = torch.full(size, shape.norm_weight(block, key), dtype=like.dtype)
        yield PlannedTensor.of(name, weight)
        return
    std = SMALL if len(size) == 1 else 1.0 if key == "embed" else gain / math.sqrt(size[-1])
    yield PlannedTensor(name, like, _normal(like.numel(), std, pool.seed()))


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
