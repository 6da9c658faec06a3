"""Checkpoints of published size that take no disk: whole headers, and files that are mostly holes.

Whoever reads headers alone cannot tell them from real ones. Only what a header's reader looks
into has bytes: the JSON of quant_state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from layersweep.checkpoint import nf4
from layersweep.checkpoint.header import ITEM_BYTES
from layersweep.checkpoint.synth_shapes import QUANTIZATION, PublishedShape
from layersweep.checkpoint.writer import header_bytes
from layersweep.families.weights import blocks

SHARD_BYTES = 5_000_000_000
FLOAT = {False: ("BF16", "bfloat16"), True: ("F16", "float16")}  # by whether it is quantized
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
    folder: Path, shape: PublishedShape, *, packed: bool, beside: Mapping[str, tuple[int, ...]] = {}
) -> int:
    """The model with its published names, NF4 if `packed` and bfloat16 otherwise; its bytes.
    `beside`: further tensors in bfloat16."""
    rows = [*_rows(shape, packed), *(Row(name, "BF16", size) for name, size in beside.items())]
    total, shards = 0, dict[str, list[Row]]()
    for row in rows:
        name = f"model-{1 + total // SHARD_BYTES:05d}.safetensors"
        shards.setdefault(name, []).append(row)
        total += row.nbytes
    for name, shard in shards.items():
        _write(folder / name, shard)
    weight_map = {row.name: name for name, shard in shards.items() for row in shard}
    config = dict(shape.fields) | {"torch_dtype": FLOAT[packed][1]}
    if packed:
        config["quantization_config"] = QUANTIZATION
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _rows(shape: PublishedShape, packed: bool) -> Iterator[Row]:
    for block in blocks(shape.decoder):
        for key, size in block.weights.items():
            name = shape.stored_name(block, key)
            if packed and shape.packs(block, key):
                yield from _packed(name, size)
            else:
                yield Row(name, FLOAT[packed][0], size)


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
