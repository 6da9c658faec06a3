"""Checkpoints of published size that take no disk: whole headers, and files that are mostly holes.

Whoever reads headers alone cannot tell them from real ones. Only what a header's reader looks
into has bytes: the JSON of quant_state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from layersweep.checkpoint import nf4
from layersweep.checkpoint.header import ITEM_BYTES
from layersweep.checkpoint.synth_shapes import SETTINGS, PublishedShape
from layersweep.checkpoint.writer import header_bytes
from layersweep.families.spec import Decoder
from layersweep.families.weights import blocks

SHARD_BYTES = 5_000_000_000
FLOAT = {"nf4": ("F16", "float16")}  # of what is not quantized; BF16 in all others
FLOATS = ("BF16", "bfloat16")
FP8_BLOCK = 128
NAMES = {torch.uint8: "U8", torch.float32: "F32"}


class Row(NamedTuple):
    """A tensor of a file. `data` None: a hole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_sparse(
    folder: Path, shape: PublishedShape, *, weights: str, beside: Iterable[Row] = ()
) -> int:
    """The model with its published names; its bytes. `weights`: of SETTINGS, or "bf16"."""
    rows = [*rows_of(shape, weights), *beside]
    total, shards = 0, dict[str, list[Row]]()
    for row in rows:
        name = f"model-{1 + total // SHARD_BYTES:05d}.safetensors"
        shards.setdefault(name, []).append(row)
        total += row.nbytes
    for name, shard in shards.items():
        _write(folder / name, shard)
    weight_map = {row.name: name for name, shard in shards.items() for row in shard}
    config = dict(shape.fields) | {"torch_dtype": FLOAT.get(weights, FLOATS)[1]}
    if weights in SETTINGS:
        config["quantization_config"] = SETTINGS[weights]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def rows_of(shape: PublishedShape, weights: str) -> Iterator[Row]:
    for block in blocks(shape.decoder):
        if weights == "mxfp4" and block.role == "expert":
            if block.expert == 0:
                yield from _mxfp4(block.layer, block.weights, shape.decoder)
            continue
        for key, size in block.weights.items():
            name = shape.stored_name(block, key)
            if weights == "nf4" and shape.packs(block, key):
                yield from _packed(name, size)
            elif weights == "fp8" and shape.packs(block, key):
                yield Row(name, "F8_E4M3", size)
                yield Row(f"{name}_scale_inv", "F32", tuple(-(-n // FP8_BLOCK) for n in size))
            else:
                exact = key == "router_correction" and weights == "fp8"
                yield Row(name, "F32" if exact else FLOAT.get(weights, FLOATS)[0], size)


def _mxfp4(
    layer: int | None, weights: Mapping[str, tuple[int, ...]], decoder: Decoder
) -> Iterator[Row]:
    """All experts of a layer, as gpt-oss has them."""
    experts = decoder.layers[0].feed.experts
    for key in ("gate_up", "down"):
        name = f"model.layers.{layer}.mlp.experts.{key}_proj"
        rows, columns = weights[f"{key}_proj"]
        yield Row(f"{name}_blocks", "U8", (experts, rows, columns // 32, 16))
        yield Row(f"{name}_scales", "U8", (experts, rows, columns // 32))
        yield Row(f"{name}_bias", "BF16", (experts, rows))


def _packed(name: str, size: tuple[int, ...]) -> Iterator[Row]:
    elements = math.prod(size)
    count = -(-elements // 64)
    absmax = torch.empty(-(-count // 256), device="meta")
    nested = nf4.NestedScales(absmax, torch.empty(256, device="meta"), 256, 0.0)
    bytes_ = [torch.empty(n, dtype=torch.uint8, device="meta") for n in (elements // 2, count)]
    quantized = nf4.QuantizedTensor(*bytes_, 64, nested)
    for part, tensor in nf4.to_tensors(name, quantized, torch.float16, size).items():
        data = None if tensor.is_meta else tensor.numpy().tobytes()
        yield Row(part, NAMES[tensor.dtype], tuple(tensor.shape), data)


def _write(path: Path, rows: list[Row]) -> None:
    rows.sort(key=lambda row: -ITEM_BYTES[row.dtype])
    head = header_bytes((row.name, row.dtype, row.shape) for row in rows)
    with path.open("wb") as file:
        file.write(head)
        at = len(head)
        for row in rows:
            if row.data is not None:
                file.seek(at)
                file.write(row.data)
            at += row.nbytes
        file.truncate(at)
