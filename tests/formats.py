"""Weights in the formats of other quantizers, drawn at random and packed as those publish them.

Nothing here uses layersweep: what a weight is dense follows from the numbers that were drawn, or,
where transformers decodes a format, from its function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

GROUP = 16
TILE = (16, 24)  # rows and columns to a scale of FP8: neither divides all matrices of the tests
Rng = np.random.Generator
Ints = NDArray[np.int64]
Drawn = tuple[dict[str, Tensor], Tensor]  # tensors by the end of their name, the weight in float32


@dataclass(frozen=True)
class Format:
    """`draw(rows, columns, generator, edges)`: a weight; with `edges`, of any bytes and scales.
    `settings`: quantization_config. `kind`, `words`: as `inspect` says them."""

    draw: Callable[[int, int, Rng, bool], Drawn]
    settings: Mapping[str, Any]
    kind: str
    words: str


def scales_of(shape: tuple[int, ...], columns: int, rng: Rng, edges: bool) -> Tensor:
    """Positive numbers near those that make a row's norm 1; with `edges`, zeros and denormals."""
    drawn = torch.from_numpy(rng.uniform(0.5, 1.5, shape) / np.sqrt(columns)).float()
    if edges:
        for number in (0.0, 1e-40, 1e-45, 3e4, 1.18e-38):
            drawn[torch.from_numpy(rng.random(shape) < 0.1)] = number
    return drawn


# --- FP8 -----------------------------------------------------------------------------------------


def _e4m3(rows: int, columns: int, rng: Rng, edges: bool) -> Tensor:
    if edges:  # every code, NaN among them
        codes = torch.from_numpy(rng.integers(0, 256, (rows, columns), np.uint8))
        return codes.view(torch.float8_e4m3fn)
    return torch.from_numpy(rng.normal(size=(rows, columns))).to(torch.float8_e4m3fn)


def _fp8(shape_of: Callable[[int, int], tuple[int, int]], suffix: str, dtype: torch.dtype) -> Any:
    """`shape_of`: rows and columns that share a scale, of a weight's rows and columns."""

    def draw(rows: int, columns: int, rng: Rng, edges: bool) -> Drawn:
        height, width = shape_of(rows, columns)
        grid = -(-rows // height), -(-columns // width)
        data = _e4m3(rows, columns, rng, edges)
        scale = scales_of(grid, columns, rng, edges).to(dtype)
        spread = scale.float().numpy().repeat(height, 0).repeat(width, 1)[:rows, :columns]
        dense = data.float() * torch.from_numpy(spread)
        return {"weight": data, f"weight{suffix}": scale}, dense

    return draw


def fp8_by_transformers(data: Tensor, scale: Tensor) -> Tensor:
    """Of a weight whose blocks are all whole, in float32."""
    return Fp8Dequantize(None)._dequantize_one(data, scale, torch.float32)


# --- four-bit floats -----------------------------------------------------------------------------


def e2m1(codes: Ints) -> NDArray[np.float32]:
    """By the meaning of the bits: sign, two of exponent with bias 1, one of mantissa."""
    power, half = codes >> 1 & 3, codes & 1
    size = np.where(power == 0, half / 2, (1 + half / 2) * 2.0 ** (power - 1))
    return np.where(codes >> 3, -size, size).astype(np.float32)


def _low_first(codes: Ints) -> Tensor:
    return torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))


def _nvfp4(names: tuple[str, str, str], divides: bool) -> Any:
    def draw(rows: int, columns: int, rng: Rng, edges: bool) -> Drawn:
        codes = rng.integers(0, 16, (rows, columns))
        low, high = (0, 0x7F) if edges else (0x30, 0x48)  # 0x7f is NaN
        drawn = rng.integers(low, high, (rows, columns // GROUP), np.uint8)
        own = torch.from_numpy(drawn).view(torch.float8_e4m3fn)
        size = (
            float(rng.choice([1e-20, 3.7e-3, 1.0, 448.0]))
            if edges
            else float(0.5 / np.sqrt(columns))
        )
        whole = torch.tensor([1 / size if divides else size])
        both = own.float() / whole if divides else own.float() * whole
        dense = torch.from_numpy(e2m1(codes)) * both.repeat_interleave(GROUP, 1)
        return dict(zip(names, (_low_first(codes), own, whole), strict=True)), dense

    return draw


def draw_mxfp4(experts: int, rows: int, columns: int, rng: Rng, edges: bool) -> Drawn:
    """Of all experts of a layer; dense [experts, rows, columns], as transformers decodes it but
    for the turn at its end."""
    shape = experts, rows, columns // 32
    blocks = torch.from_numpy(rng.integers(0, 256, (*shape, 16), np.uint8))
    low, high = (0, 254) if edges else (122, 126)
    scales = torch.from_numpy(rng.integers(low, high, shape, np.uint8))
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    return {"_blocks": blocks, "_scales": scales}, dense


# --- four-bit integers ---------------------------------------------------------------------------


def words_of(numbers: Ints, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """int32 [n, m / 8] of [n, m]: place i of a word holds its number order[i]."""
    padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % 8)))
    words = sum(padded[:, order[place] :: 8] << 4 * place for place in range(8))
    return torch.from_numpy(np.asarray(words, np.uint64).astype(np.uint32).view(np.int32))


def _integers(rows: int, columns: int, rng: Rng) -> tuple[Ints, Ints]:
    """Numbers [rows, columns] and zero points [rows, groups]."""
    return rng.integers(0, 16, (rows, columns)), rng.integers(4, 12, (rows, columns // GROUP))


def _dense(numbers: Ints, zeros: Ints, scale: Tensor, group: Ints) -> Tensor:
    """`group`: of each column."""
    signed = torch.from_numpy(numbers - zeros[:, group]).float()
    return signed * scale.float()[:, torch.from_numpy(group)]


def _packed(zero_points: bool, sorted_columns: bool) -> Any:
    def draw(rows: int, columns: int, rng: Rng, edges: bool) -> Drawn:
        numbers, zeros = _integers(rows, columns, rng)
        group = np.arange(columns) // GROUP
        scale = scales_of(zeros.shape, columns, rng, edges).bfloat16()
        found = {"weight_packed": words_of(numbers), "weight_scale": scale}
        found["weight_shape"] = torch.tensor([rows, columns])
        if zero_points:
            found["weight_zero_point"] = words_of(zeros.T).t()
        if sorted_columns:
            group = rng.permutation(group)
            found["weight_g_idx"] = torch.from_numpy(group).int()
        return found, _dense(numbers, zeros if zero_points else 0 * zeros + 8, scale, group)

    return draw


def _awq(rows: int, columns: int, rng: Rng, edges: bool) -> Drawn:
    numbers, zeros = _integers(rows, columns, rng)
    scale = scales_of(zeros.shape, columns, rng, edges).half()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    found = {
        "qweight": words_of(numbers.T, order), "qzeros": words_of(zeros.T, order),
        "scales": scale.t(),
    }  # fmt: skip
    return found, _dense(numbers, zeros, scale, np.arange(columns) // GROUP)


def _gptq(less: int, sorted_columns: bool) -> Any:
    def draw(rows: int, columns: int, rng: Rng, edges: bool) -> Drawn:
        numbers, zeros = _integers(rows, columns, rng)
        scale = scales_of(zeros.shape, columns, rng, edges).half()
        group = np.arange(columns) // GROUP
        group = rng.permutation(group) if sorted_columns else group
        found = {
            "qweight": words_of(numbers).t(), "qzeros": words_of(zeros.T - less),
            "scales": scale.t(), "g_idx": torch.from_numpy(group).int(),
        }  # fmt: skip
        return found, _dense(numbers, zeros, scale, group)

    return draw


# --- all of them ---------------------------------------------------------------------------------


def _compressed(packing: str, **weights: object) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": packing, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip


_INT4 = _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP)
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
FORMATS = {
    "fp8-blocks": Format(
        _fp8(lambda rows, columns: TILE, "_scale_inv", torch.float32),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [*TILE],
         "activation_scheme": "dynamic"}, "fp8", "blocks of 16 x 24",
    ),
    "fp8-rows": Format(
        _fp8(lambda rows, columns: (1, columns), "_scale", torch.bfloat16),
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        "fp8", "a scale per row",
    ),
    "fp8-tensor": Format(
        _fp8(lambda rows, columns: (rows, columns), "_scale", torch.float16),
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8}},
        "fp8", "one scale",
    ),
    "nvfp4-modelopt": Format(
        _nvfp4(("weight", "weight_scale", "weight_scale_2"), divides=False),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", "groups of 16",
    ),
    "nvfp4-packed": Format(
        _nvfp4(("weight_packed", "weight_scale", "weight_global_scale"), divides=True),
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        "nvfp4", "groups of 16",
    ),
    "int4": Format(_packed(False, False), _INT4, "int4", "groups of 16"),
    "int4-zeros": Format(_packed(True, False), _INT4, "int4", "groups of 16, zero points"),
    "int4-sorted": Format(
        _packed(True, True), _INT4, "int4", "groups of 16, zero points, sorted columns"
    ),
    "awq": Format(
        _awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
               "version": "gemm"}, "awq", "groups of 16, zero points",
    ),
    "gptq": Format(
        _gptq(1, sorted_columns=False), {**_GPTQ, "desc_act": False},
        "gptq", "groups of 16, zero points, sorted columns",
    ),
    "gptq-sorted": Format(
        _gptq(0, sorted_columns=True), {**_GPTQ, "checkpoint_format": "gptq_v2"},
        "gptq", "groups of 16, zero points, sorted columns",
    ),
}  # fmt: skip


def repack(source: Path, folder: Path, form: Format, seed: int) -> dict[str, Tensor]:
    """Write the checkpoint of `source` to `folder`, its linear layers drawn anew in a format;
    returns the dense weights of all."""
    rng = np.random.default_rng(seed)
    tensors, dense = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(source / "model.safetensors").items():
        if ("_proj" in name and name.endswith(".weight")) or ".experts." in name:
            found, dense[name] = form.draw(*tensor.shape, rng, False)
            tensors |= {name.removesuffix("weight") + end: part for end, part in found.items()}
        else:
            tensors[name] = dense[name] = tensor
    write(source, folder, tensors, form.settings)
    return dense


def repack_mxfp4(source: Path, folder: Path, seed: int) -> dict[str, Tensor]:
    """The same of a gpt-oss, its experts drawn anew in MXFP4; dense as transformers has them."""
    rng = np.random.default_rng(seed)
    tensors, dense = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            found, own = draw_mxfp4(experts, rows, columns, rng, False)
            tensors |= {name + end: part for end, part in found.items()}
            dense[name] = own.transpose(1, 2)
        else:
            tensors[name] = dense[name] = tensor
    write(source, folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]})
    return dense


def write(
    source: Path, folder: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """`settings`: quantization_config, or nothing for a model that is not quantized."""
    folder.mkdir(exist_ok=True)
    fields = json.loads((source / "config.json").read_text())
    more = {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(fields | more))
    whole = {name: one.contiguous() for name, one in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
