"""Fused experts in NF4, as bitsandbytes' parametrization writes them: every expert is a slice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_builders import (
    EXPERTS,
    FFN,
    HIDDEN,
    LAYERS,
    STATE,
    fuse,
    pack,
    random_weights,
    read_tensors,
    tiny_checkpoint,
    tiny_config,
    write_checkpoint,
)
from torch import Tensor, nn

from layersweep.bench.sync_nf4 import LoadedWeight
from layersweep.checkpoint import Checkpoint, open_checkpoint, scan_checkpoint
from layersweep.stream.blocks import Block, block_specs
from layersweep.stream.reader import RunReader
from layersweep.stream.runs import runs_of
from layersweep.sweep.model import load

UP, DOWN = "gate_up_proj", "down_proj"
SHAPES = {UP: (EXPERTS, 2 * FFN, HIDDEN), DOWN: (EXPERTS, HIDDEN, FFN)}
PARTS = {  # tensor, first row, rows
    "gate_proj": (UP, 0, FFN),
    "up_proj": (UP, FFN, FFN),
    "down_proj": (DOWN, 0, HIDDEN),
}


def fused_name(layer: int, tensor: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{tensor}"


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, tensors, 1)
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    return folder


def slices(part: str) -> Iterator[tuple[int, slice]]:
    """(expert, its elements in the flat fused tensor) of every expert's weight of that part."""
    tensor, first, count = PARTS[part]
    _, rows, columns = SHAPES[tensor]
    for expert in range(EXPERTS):
        start = (expert * rows + first) * columns
        yield expert, slice(start, start + count * columns)


def arrived(checkpoint: Checkpoint) -> dict[str, Block]:
    """Every block, read as a sweep reads it."""
    specs, blocks = block_specs(checkpoint), {}
    reader = RunReader(specs)
    for run in runs_of(specs):
        target = torch.full((run.nbytes,), 255, dtype=torch.uint8)
        assert sum(task() for task in reader.tasks(run, target)) >= run.stored_bytes
        reader.check(run, target)
        for number, start in zip(run.blocks, run.offsets, strict=True):
            spec = specs[number]
            blocks[spec.name] = Block(spec, target[start : start + spec.nbytes])
    reader.close()
    return blocks


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_decoded_experts_equal_bitsandbytes_bit_for_bit(tmp_path: Path, nested: bool) -> None:
    """96 scales a weight, 256 a nested block: most slices start inside a nested block."""
    bnb = pytest.importorskip("bitsandbytes")
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    stored = {name: weight.bfloat16() for name, weight in fuse(random_weights(0)).items()}
    states = {}
    for name in [name for name in stored if "experts" in name]:
        holder = nn.Module()
        holder.register_parameter("x", nn.Parameter(stored.pop(name), requires_grad=False))
        parametrize.replace_parameter_4bit(holder, "x", compress_statistics=nested, blocksize=64)
        saved = holder.state_dict()
        stored |= {name + key.removeprefix("x"): tensor for key, tensor in saved.items()}
        states[name] = holder.get_submodule("parametrizations.x.0").quant_state
    checkpoint = open_checkpoint(str(write(tmp_path, stored)))
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())
    blocks = arrived(checkpoint)
    for layer in range(LAYERS):
        for part, (tensor, _, _) in PARTS.items():
            name = fused_name(layer, tensor)
            # as one row: its AVX-512 kernel takes wrong scales where a block crosses rows
            states[name].shape = torch.Size((1, states[name].shape.numel()))
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                states[name].dtype = dtype
                with torch.compiler.set_stance("force_eager"):
                    flat = bnb.functional.dequantize_4bit(stored[name], states[name]).reshape(-1)
                for expert, elements in slices(part):
                    weight = checkpoint.weights[f"layers.{layer}.experts.{expert}.{part}"]
                    plainly = LoadedWeight.read(weight).dense(dtype, bitsandbytes=False)
                    assert torch.equal(plainly.reshape(-1), flat[elements]), (name, expert, dtype)
                    found = blocks[f"layers.{layer}.experts.{expert}"].dense(part, dtype)
                    assert torch.equal(found.reshape(-1), flat[elements]), (name, expert, dtype)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_windows_score_as_with_the_same_weights_one_by_one(tmp_path: Path, nested: bool) -> None:
    fused = tiny_checkpoint(tmp_path / "fused", "fused", nested=nested, router="float")
    apart = one_by_one(fused, tmp_path / "apart")
    windows = [torch.arange(count) * 7 % 128 for count in (40, 90)]
    scores = [
        load(str(folder), device="cpu").score([window.tolist() for window in windows])
        for folder in (fused, apart)
    ]
    for found, expected in zip(*scores, strict=True):
        assert torch.equal(found, expected)


def one_by_one(fused: Path, folder: Path) -> Path:
    """The packed bytes of `fused` expert by expert, with the scales they have there, plain."""
    tensors = read_tensors(fused)
    stored = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(LAYERS):
        for part, (tensor, _, rows) in PARTS.items():
            name = fused_name(layer, tensor)
            packed, scales = tensors[name].reshape(-1), plain_scales(name, tensors)
            for expert, elements in slices(part):
                new = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                stored |= pack(new, torch.ones(rows, SHAPES[tensor][2]), nested=False)
                at, end = elements.start, elements.stop
                stored[new] = packed[at // 2 : end // 2, None].clone()
                stored[f"{new}.absmax"] = scales[at // 64 : end // 64].clone()
    return write(folder, stored)


def plain_scales(name: str, tensors: dict[str, Tensor]) -> Tensor:
    scales = tensors[f"{name}.absmax"]
    if f"{name}.nested_absmax" not in tensors:
        return scales
    offset = json.loads(bytes(tensors[name + STATE].tolist()))["nested_offset"]
    outer = tensors[f"{name}.nested_absmax"][torch.arange(len(scales)) // 256]
    levels = tensors[f"{name}.nested_quant_map"][scales.long()]
    return levels * outer + torch.tensor(offset, dtype=torch.float32)


@pytest.mark.parametrize("tensor", [UP, DOWN])
def test_blocks_that_reach_into_the_next_expert_are_refused(tmp_path: Path, tensor: str) -> None:
    """6,144 elements a weight: blocks of 2,048 end with it, those of 4,096 do not."""
    tiny_checkpoint(tmp_path, "fused")
    name, tensors = fused_name(1, tensor), read_tensors(tmp_path)
    weight = torch.randn(SHAPES[tensor], generator=torch.Generator().manual_seed(0))
    write(tmp_path, tensors | pack(name, weight, nested=True, blocksize=2048))
    assert open_checkpoint(str(tmp_path))
    write(tmp_path, tensors | pack(name, weight, nested=True, blocksize=4096))
    checkpoint, problems = scan_checkpoint(str(tmp_path))
    assert checkpoint is None
    assert [problem.sentence() for problem in problems] == [
        f"{tmp_path}/model.safetensors: {name}: found nf4 blocks of 4096 elements that reach "
        "from one expert's weight into the next, needed a block size that divides the 6144 "
        "elements of each"
    ]
    assert "smaller block size" in problems[0].hint
