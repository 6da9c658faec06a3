"""What a sweep takes its memory for, on the CPU as a GPU has it: in one buffer of planned size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_builders import pack
from family_builders import GLM_MOE, LATENT, SMALL, tensors_of, written
from safetensors.torch import load_file, save_file
from torch import Tensor

from layersweep.families.weights import layer_blocks
from layersweep.kv import parse
from layersweep.kv.arms import EXACT, Arm
from layersweep.model.attention import PlainAttention
from layersweep.model.compute import Scratch, on_cpu
from layersweep.model.ops import Parts, TorchOps
from layersweep.stream import shapes
from layersweep.sweep import engine as engine_module
from layersweep.sweep import loop, visits
from layersweep.sweep.attention import visit_attention
from layersweep.sweep.context import LayerContext
from layersweep.sweep.dense import DenseWeights
from layersweep.sweep.model import load
from layersweep.sweep.record import joined
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile
from layersweep.sweep.state import TileState


class Buffered(Scratch):
    """As on a GPU: memory that is handed out again, and an AssertionError where it is too small."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(nbytes, device)
        self._buffer = torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN, read as floats


NARROW = {"head_dim": 8, "v_head_dim": 8, "intermediate_size": 8, "moe_intermediate_size": 8}
WIDE: Mapping[str, Mapping[str, object]] = {
    "heads": {**NARROW, "head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 4},
    "feed": {**NARROW, "intermediate_size": 256, "moe_intermediate_size": 256},
    "hidden": {**NARROW, "hidden_size": 256},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: Mapping[str, Mapping[str, object]] = {
    "qwen3": {**SMALL, "attention_bias": True},
    "qwen2_moe": {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 12},
    "olmo2": SMALL,
    "glm4": SMALL,
    "gemma3_text": {**SMALL, "sliding_window": 8, "sliding_window_pattern": 2},
    "gpt_oss": {**SMALL, **EXPERTS, "sliding_window": 8},
    "granite": {**SMALL, "attention_bias": True, "residual_multiplier": 0.5},
    "deepseek_v3": {**LATENT, "q_lora_rank": 24, "n_group": 1, "topk_group": 1},
}


def random_checkpoint(folder: Path, model_type: str, fields: Mapping[str, object]) -> str:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(zeros.shape, generator=generator) * 0.2
        for name, zeros in tensors_of(model_type, fields, fused=model_type == "gpt_oss").items()
    }
    return written(folder, {**fields, "model_type": model_type}, tensors)


ARMS = EXACT, parse("lloyd:K3V2"), parse("lloyd:K4V4@window=4")


def losses(folder: str, arms: tuple[Arm, ...] = ARMS) -> Tensor:
    """Of two sequences: an exact branch, arms, and arms that are read as they grow."""
    ids = tuple(torch.randint(32, (30,), generator=torch.Generator().manual_seed(1)).tolist())
    branched = tuple(Branch(arm, ids[20:], (0, 10)) for arm in arms)
    growing = tuple(Branch(arm, ids, (0, 30), True) for arm in arms)
    found: list[Tensor] = []
    model = load(folder, device="cpu", vram="1GiB", ram="1GiB")
    for sequence in (BranchedSequence(ids[:20], branched), BranchedSequence((), growing)):
        tile = Tile("t", (sequence,))
        model.run([tile], lambda tile, index, sequence, pieces: found.extend(joined(pieces)))
    return torch.cat([one.log_softmax(-1)[:, 0] for one in found])


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_buffer_of_planned_size_is_enough(
    model_type: str, wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_checkpoint(tmp_path, model_type, {**FAMILIES[model_type], **WIDE[wide]})
    expected = losses(folder)
    assert expected.isfinite().all()
    monkeypatch.setattr(engine_module, "Scratch", Buffered)
    assert torch.equal(losses(folder), expected)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_keys_of_many_branches_that_turn_at_once_fit_the_plan(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**FAMILIES[model_type], **WIDE["heads"]}
    folder = random_checkpoint(tmp_path, model_type, fields)
    arms = *ARMS, *(parse(f"lloyd:K{bits}V{bits}@sink=3") for bits in (2, 3, 4, 5))
    expected = losses(folder, arms)
    monkeypatch.setattr(PlainAttention, "reads_past", True)
    monkeypatch.setattr(engine_module, "Scratch", Buffered)
    assert torch.equal(losses(folder, arms), expected)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_products_that_gather_kept_rows_change_no_number(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with grouped products: rows are normed once for the router and the experts."""
    folder = random_checkpoint(tmp_path, model_type, {**SMALL, **EXPERTS, "head_dim": 8})
    for module in (visits, shapes):
        monkeypatch.setattr(module, "experts_at_once", lambda *args, cpu: 2)
    expected = losses(folder)
    product, gathered = TorchOps.products, []

    def spy(
        ops: TorchOps, x: Tensor, weights: Tensor, biases: Tensor | None, parts: Parts,
        memory: Tensor, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if rows is not None:
            gathered.append(len(x))
        return product(ops, x, weights, biases, parts, memory, rows)

    monkeypatch.setattr(TorchOps, "products", spy)
    monkeypatch.setattr(TorchOps, "grouped", lambda *args: None)
    monkeypatch.setattr(engine_module, "Scratch", Buffered)
    assert torch.equal(losses(folder), expected)
    layers = load(folder, device="cpu").decoder.num_hidden_layers
    assert gathered == [20 + 3 * 10] * 2 * layers + [3 * 30] * 2 * layers  # rows of either tile


def test_only_the_checked_tile_keeps_its_router_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(random_checkpoint(tmp_path, "qwen2_moe", FAMILIES["qwen2_moe"]), device="cpu")
    engine, kept = model.open(model.plan([])), set()

    def visit(state: TileState, context: LayerContext) -> None:
        visit_attention(state, context)
        kept.add((state.tile.name, state.router_logits is not None))

    monkeypatch.setattr(loop, "visit_attention", visit)
    lead, tile = (
        Tile(name, (BranchedSequence((), (Branch(EXACT, tuple(range(20)), (0, 1)),)),))
        for name in ("lead", "t")
    )
    try:
        loop.run_sweep(engine, [tile], lambda *read: None, lead=lead, check=lambda health: None)
    finally:
        engine.close()
    assert kept == {("lead", True), ("t", False)}


@pytest.mark.parametrize("packed", [False, True])
def test_a_router_defined_in_float32_is_kept_so(tmp_path: Path, packed: bool) -> None:
    folder, name = (
        random_checkpoint(tmp_path, "glm4_moe", GLM_MOE),
        "model.layers.1.mlp.gate.weight",
    )
    tensors = load_file(tmp_path / "model.safetensors")
    expected = tensors[name]
    assert not torch.equal(expected, expected.bfloat16().float())
    if packed:
        tensors |= pack(name, tensors.pop(name), nested=False)
        save_file(tensors, tmp_path / "model.safetensors")
    model = load(folder, device="cpu")
    engine = model.open(model.plan([]))
    weights = DenseWeights(model.decoder, on_cpu(torch.bfloat16))
    try:
        with engine.visited():
            for number, spec in enumerate(engine.store.specs):
                block = engine.store.get(number)
                if spec.name == "layers.1.attention":
                    weights.fill_attention(block, list(layer_blocks(model.decoder, 1))[1:])
                    if packed:
                        expected = block.dense("router", torch.bfloat16).float()
                engine.store.release(number)
    finally:
        engine.close()
    exact = {key for key, one in weights.attention.items() if one.dtype == torch.float32}
    assert exact == {"router", "router_correction"}
    assert torch.equal(weights.attention["router"], expected)
