"""Mixtral-8x7B as published in NF4 (double quant, packed router): shapes and bytes, no data."""

from __future__ import annotations

import json
from pathlib import Path

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.layout import Weight
from layersweep.checkpoint.storage.floats import Floats
from layersweep.checkpoint.storage.four_bit import FourBit, Nested
from layersweep.checkpoint.synth_shapes import MIXTRAL_8X7B
from layersweep.stream.blocks import BlockSpec, specs_of

MIXTRAL = MIXTRAL_8X7B.decoder


def stored(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> StoredTensor:
    return StoredTensor(name, Path("absent.safetensors"), dtype, shape, 0, nbytes)


def json_of(rows: int, columns: int) -> str:
    return json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16",
                       "shape": [rows, columns], "nested_blocksize": 256,
                       "nested_dtype": "float32", "nested_offset": 0.0})  # fmt: skip


def nf4(name: str, rows: int, columns: int) -> Weight:
    elements = rows * columns
    blocks = -(-elements // 64)
    groups = -(-blocks // 256)
    nested = Nested(
        stored(f"{name}.nested_absmax", "F32", (groups,), 4 * groups),
        stored(f"{name}.nested_quant_map", "F32", (256,), 1024),
        256,
        0.0,
    )
    absmax = stored(f"{name}.absmax", "U8", (blocks,), blocks)
    # quant_map 64 bytes; the JSON differs by the digits of its shape
    data = stored(name, "U8", (elements // 2, 1), elements // 2)
    checked = 64 + len(json_of(rows, columns))
    return Weight(name, (rows, columns), FourBit("nf4", data, 64, absmax, nested, checked))


def half(name: str, *shape: int) -> Weight:
    elements = 1
    for size in shape:
        elements *= size
    return Weight(name, shape, Floats(stored(name, "F16", shape, 2 * elements)))


PARTS = (("gate_proj", 14_336, 4096), ("up_proj", 14_336, 4096), ("down_proj", 4096, 14_336))


def mixtral_specs() -> list[BlockSpec]:
    h = MIXTRAL.hidden_size
    weights = {"embed": half("embed", 32_000, h), "lm_head": half("lm_head", 32_000, h)}
    weights["norm"] = half("norm", h)
    for layer in range(32):
        at = f"layers.{layer}"
        for name in ("attention_norm", "feed_norm"):
            weights[f"{at}.{name}"] = half(name, h)
        for name, rows in (("q_proj", h), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", h)):
            weights[f"{at}.{name}"] = nf4(name, rows, h)
        weights[f"{at}.router"] = nf4("router", 8, h)
        for expert in range(8):
            for name, rows, columns in PARTS:
                weights[f"{at}.experts.{expert}.{name}"] = nf4(name, rows, columns)
    return specs_of(MIXTRAL, weights)
