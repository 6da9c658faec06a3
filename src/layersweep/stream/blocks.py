"""Blocks: the runs of weights that move and are used together.

A block is an embedding, one layer's attention (with its norms and router), one expert, or
the head. Its stored tensors lie in one arena, each at a 256-byte-aligned offset (packed
tensors are only byte-aligned in their file), so that a block is one copy to the device and
is dequantized there.

    file bytes --read_block--> arena (uint8) --Block.dense--> one dense weight in a scratch
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.config import ModelConfig
from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.layout import Checkpoint, Weight
from layersweep.errors import CheckpointError

ALIGNMENT = 256
ATTENTION_WEIGHTS = (
    *("input_norm", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("post_attention_norm", "router"),
)
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Slot:
    """A byte range of an arena. `source` is None where the bytes are made while reading."""

    source: StoredTensor | None
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlacedWeight:
    """One weight inside a block's arena.

    `absmax` and the nested slots exist for quantized weights. `quantize` marks a float weight
    that becomes plain NF4 (blocks of 64, float32 absmax) while it is read.
    """

    weight: Weight
    data: Slot
    absmax: Slot | None = None
    nested_absmax: Slot | None = None
    nested_quant_map: Slot | None = None
    quantize: bool = False

    @property
    def slots(self) -> list[Slot]:
        slots = [self.data, self.absmax, self.nested_absmax, self.nested_quant_map]
        return [slot for slot in slots if slot is not None]

    @property
    def packed(self) -> bool:
        return self.quantize or self.weight.quant is not None


@dataclass(frozen=True)
class BlockSpec:
    """What a block holds and where. `nbytes` is the arena, `stored_bytes` what is read."""

    name: str
    layer: int | None
    weights: Mapping[str, PlacedWeight]
    nbytes: int
    stored_bytes: int


def block_specs(checkpoint: Checkpoint, *, quantize: bool = False) -> list[BlockSpec]:
    """All blocks of a checkpoint in sweep order; `quantize` turns float matrices into NF4."""
    return specs_of(checkpoint.config, checkpoint.weights, quantize=quantize)


def specs_of(
    config: ModelConfig, weights: Mapping[str, Weight], *, quantize: bool = False
) -> list[BlockSpec]:
    """Blocks of a model's weights, by canonical name: embed, layers, head."""
    specs = [_spec(weights, "embed", None, {"embed": "embed"}, False)]
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}"
        keys = {name: f"{at}.{name}" for name in ATTENTION_WEIGHTS}
        specs.append(_spec(weights, f"{at}.attention", layer, keys, quantize))
        for expert in range(config.num_local_experts):
            keys = {w: f"{at}.experts.{expert}.{w}" for w in ("w1", "w3", "w2")}
            specs.append(_spec(weights, f"{at}.experts.{expert}", layer, keys, quantize))
    head = {"norm": "norm", "lm_head": "lm_head"}
    return [*specs, _spec(weights, "head", None, head, False)]


def _spec(
    weights: Mapping[str, Weight],
    name: str,
    layer: int | None,
    keys: Mapping[str, str],
    quantize: bool,
) -> BlockSpec:
    placed, end = {}, 0
    for key, canonical in keys.items():
        weight = weights[canonical]
        # the router is 0.02 % of a layer and decides where every token goes: never re-quantized
        to_nf4 = quantize and weight.quant is None and len(weight.shape) == 2 and key != "router"
        placed[key], end = _place(weight, end, to_nf4)
    stored = sum(read_bytes(p.weight) for p in placed.values())
    return BlockSpec(name, layer, placed, end, stored)


def read_bytes(weight: Weight) -> int:
    """Bytes read per visit: companions that were checked at opening are not read again."""
    return weight.nbytes - (weight.quant.other_nbytes if weight.quant else 0)


def _place(weight: Weight, end: int, quantize: bool) -> tuple[PlacedWeight, int]:
    def slot(source: StoredTensor | None, nbytes: int) -> Slot:
        nonlocal end
        taken = Slot(source, end, nbytes)
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return taken

    if quantize:
        elements = torch.Size(weight.shape).numel()
        data = slot(None, -(-elements // 2))
        absmax = slot(None, 4 * -(-elements // 64))
        return PlacedWeight(weight, data, absmax, quantize=True), end
    data = slot(weight.data, weight.data.nbytes)
    if weight.quant is None:
        return PlacedWeight(weight, data), end
    quant, nested = weight.quant, weight.quant.nested
    absmax = slot(quant.absmax, quant.absmax.nbytes)
    if nested is None:
        return PlacedWeight(weight, data, absmax), end
    nested_absmax = slot(nested.absmax, nested.absmax.nbytes)
    quant_map = slot(nested.quant_map, nested.quant_map.nbytes)
    return PlacedWeight(weight, data, absmax, nested_absmax, quant_map), end


class Block:
    """A block whose bytes have arrived in `arena` (uint8, on the compute device)."""

    def __init__(self, spec: BlockSpec, arena: Tensor) -> None:
        self.spec, self.arena = spec, arena

    def _view(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        return self.arena[slot.offset : slot.offset + slot.nbytes].view(dtype)

    def absmax(self, key: str) -> Tensor:
        """Float32 scales of a quantized weight, one per quantization block."""
        placed = self.spec.weights[key]
        quant = placed.weight.quant
        assert placed.absmax is not None
        if quant is None or quant.nested is None:
            return self._view(placed.absmax, torch.float32)
        assert placed.nested_absmax is not None and placed.nested_quant_map is not None
        return nf4.expand_absmax(
            self._view(placed.absmax, torch.uint8),
            self._view(placed.nested_absmax, torch.float32),
            self._view(placed.nested_quant_map, torch.float32),
            quant.nested.blocksize,
            quant.nested.offset,
        )

    def stored(self, key: str) -> Tensor:
        """A float weight as it lies in the file (a view: dtype of the file)."""
        weight = self.spec.weights[key].weight
        dtype = STORED_DTYPES[weight.data.dtype]
        return self._view(self.spec.weights[key].data, dtype).view(weight.shape)

    def dense(self, key: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype`, in memory of its own: `out` (same shape and dtype) if given."""
        placed = self.spec.weights[key]
        if not placed.packed:
            stored = self.stored(key)
            # always a copy: the arena is reused as soon as the block is released
            return stored.to(dtype, copy=True) if out is None else out.copy_(stored)
        quant = placed.weight.quant
        return nf4.dequantize(
            self._view(placed.data, torch.uint8),
            self.absmax(key),
            64 if quant is None else quant.blocksize,
            placed.weight.shape,
            dtype,
            out=out,
            code=nf4.CODES["nf4" if quant is None else quant.kind],
        )


class BlockReader:
    """Reads blocks from a checkpoint's files, each byte range straight into its arena slot."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self.bytes_read = 0

    def read(self, spec: BlockSpec, arena: Tensor) -> None:
        """Fill `arena` (uint8, CPU, at least spec.nbytes).

        Raises CheckpointError for a file that ended early or a scale that is no number.
        """
        for placed in spec.weights.values():
            if placed.quantize:
                self._read_quantized(placed, arena)
                continue
            for slot in placed.slots:
                assert slot.source is not None
                self._read_range(slot.source, arena[slot.offset : slot.offset + slot.nbytes])
            if placed.weight.quant is not None:
                _check_scales(placed, arena)

    def _read_range(self, source: StoredTensor, target: Tensor) -> None:
        view = memoryview(target.numpy().data)
        handle = self._handle(source.file)
        done = 0
        while done < source.nbytes:
            count = os.preadv(handle, [view[done:]], source.offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{source.file.name}: tensor {source.name} ends after {done} bytes, "
                    f"needed {source.nbytes}",
                    hint="the file changed or was cut short while it was read: copy it again",
                )
            done += count
        self.bytes_read += done

    def _read_quantized(self, placed: PlacedWeight, arena: Tensor) -> None:
        source = placed.weight.data
        raw = torch.empty(source.nbytes, dtype=torch.uint8)
        self._read_range(source, raw)
        weight = raw.view(STORED_DTYPES[source.dtype]).view(placed.weight.shape)
        quantized = nf4.quantize(weight, blocksize=64, nested=False)
        assert placed.absmax is not None
        for slot, made in ((placed.data, quantized.packed), (placed.absmax, quantized.absmax)):
            bytes_made = made.reshape(-1).view(torch.uint8)
            arena[slot.offset : slot.offset + slot.nbytes].copy_(bytes_made)

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return self._handles[file]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def _check_scales(placed: PlacedWeight, arena: Tensor) -> None:
    """NaN and Inf scales would poison every token: found before the block is used."""
    nested = placed.nested_absmax is not None
    slots = [(placed.nested_absmax, False), (placed.nested_quant_map, True)]
    for slot, signed in slots if nested else [(placed.absmax, False)]:
        assert slot is not None
        source = slot.source
        assert source is not None
        scales = arena[slot.offset : slot.offset + slot.nbytes].view(torch.float32)
        nf4.check_scales(scales, file=source.file.name, tensor=source.name, signed=signed)
