"""Synthetic checkpoints: random weights in a published layout, at full size and disk speed.

For measuring speed and memory where no real checkpoint can be had. config.json carries
`layersweep_synthetic`, so no result of such a model is ever called publishable.

Scales: a matrix with n inputs has standard deviation 1 / sqrt(n), those that write into the
residual stream 1 / sqrt(2 L n) for L layers, so hidden states stay near 1 in fp16 whatever the
depth; router logits get a standard deviation of about 1, so that tokens go to all experts.
How the numbers of a weight are drawn is in synth_formats.py.

Every tensor is planned first, shape and place in the pool, and then written from where its bytes
lie: 24 GB pass through no memory but the page cache.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from layersweep.checkpoint.layout import demo_folder
from layersweep.checkpoint.synth_formats import (
    Pool,
    fp8_tensors,
    mxfp4_tensors,
    nf4_tensors,
    normal,
)
from layersweep.checkpoint.synth_shapes import PublishedShape
from layersweep.checkpoint.writer import (
    PlannedTensor,
    cut_shards,
    make_folder,
    write_shards,
)
from layersweep.errors import InputError
from layersweep.families.weights import BlockShape, blocks

SHARD_BYTES = 4_900_000_000
SMALL = 0.02  # standard deviation of biases, sinks and corrections
BYTES_OF = {"nf4": 0.516, "mxfp4": 0.53125, "fp8": 1.00025}  # of an element, with its scales

BESIDE = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("model.safetensors.index.json", "config.json"),
)


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
    shards = cut_shards(_tensors(shape, Pool.draw(seed, shape.weights)), shard_bytes)
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
    """About the bytes that will be written."""
    packed = float_elements = 0
    for block in blocks(shape.decoder):
        for key, size in block.weights.items():
            if shape.packs(block, key):
                packed += math.prod(size)
            elif key != "lm_head" or not shape.decoder.tie_word_embeddings:
                float_elements += math.prod(size)
    return int(BYTES_OF[shape.weights] * packed) + 2 * float_elements


def _tensors(shape: PublishedShape, pool: Pool) -> Iterator[PlannedTensor]:
    """Every tensor in the order of layers, then embedding, norm and head."""
    found = list(blocks(shape.decoder))
    for block in [*found[1:-1], found[0], found[-1]]:
        if shape.weights == "mxfp4" and block.role == "expert":
            if block.expert == 0:
                yield from _experts(shape, block, pool)
            continue
        for key, size in block.weights.items():
            if key == "lm_head" and shape.decoder.tie_word_embeddings:
                continue
            yield from _weight(shape, block, key, size, pool)


def _weight(
    shape: PublishedShape, block: BlockShape, key: str, size: tuple[int, ...], pool: Pool
) -> Iterator[PlannedTensor]:
    """A matrix as its file has it; norms that scale by 1; biases and the like small."""
    name, gain = shape.stored_name(block, key), _gain(shape, key)
    if shape.packs(block, key):
        rows, columns = size
        tensors = fp8_tensors if shape.weights == "fp8" else nf4_tensors
        yield from tensors(name, rows, columns, gain, pool)
        return
    like = torch.empty(size, dtype=shape.dtype, device="meta")
    if key.endswith("norm"):
        weight = torch.full(size, shape.norm_weight(block, key), dtype=like.dtype)
        yield PlannedTensor.of(name, weight)
        return
    std = SMALL if len(size) == 1 else 1.0 if key == "embed" else gain / math.sqrt(size[-1])
    yield PlannedTensor(name, like, normal(like, std, pool.seed()))


def _experts(shape: PublishedShape, block: BlockShape, pool: Pool) -> Iterator[PlannedTensor]:
    """All experts of a layer, in a tensor for each of their weights; `block`: any of them."""
    assert block.layer is not None
    experts = shape.decoder.layers[block.layer].feed.experts
    for key, size in block.weights.items():
        name = shape.fused_name(block, key)
        if shape.packs(block, key):
            rows, columns = size
            yield from mxfp4_tensors(name, (experts, rows, columns), _gain(shape, key), pool)
        else:
            like = torch.empty(experts, *size, dtype=shape.dtype, device="meta")
            yield PlannedTensor(name, like, normal(like, SMALL, pool.seed()))


def _gain(shape: PublishedShape, key: str) -> float:
    into_residual = key in ("o_proj", "down_proj")
    return 1.0 / math.sqrt(2 * shape.decoder.num_hidden_layers) if into_residual else 1.0
