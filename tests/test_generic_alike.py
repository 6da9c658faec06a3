"""What kernels may do in place of modules of transformers, and tables in place of angles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generic_models import random_model, small_config
from torch import Tensor, nn

from layersweep.families.generic.alike import gate_of, rms_norm_of, rms_norms
from layersweep.families.generic.build import build
from layersweep.families.generic.parts import Turning
from layersweep.model.generic import memory
from layersweep.model.generic.decoder import norm_by
from layersweep.model.generic.memory import let_segments_grow
from layersweep.model.generic.turning import Turner, Turners
from layersweep.model.ops import TorchOps


@pytest.mark.parametrize(
    ("kind", "count", "offset"),
    [("qwen3_moe", 17, 0.0), ("gemma3_text", 25, 1.0), ("gpt_oss", 0, 0.0), ("opt", 0, 0.0)],
)
def test_norms_are_recognized_by_what_they_compute(kind: str, count: int, offset: float) -> None:
    """gpt-oss rounds after its weight, OPT takes the mean off."""
    norms = rms_norms(build(small_config(kind)))
    assert len(norms) == count
    assert {(norm.eps, norm.offset) for norm in norms.values()} <= {(1e-6, offset)}


class Clipped(nn.Module):
    """A norm that leaves large numbers out, and a gate that does."""

    has_gate = True

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.weight = most, nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float().clamp(-self.most, self.most)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * y.to(x.dtype)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate).clamp(max=self.most) * up


@pytest.mark.parametrize(("most", "plain"), [(50.0, False), (1e4, True)])
def test_what_differs_for_large_numbers_alone_is_not_taken_for_plain(
    most: float, plain: bool
) -> None:
    module = Clipped(most)
    assert (rms_norm_of(module) is not None, gate_of(module, torch.float16, 16)) == (
        plain, "silu" if plain else None,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "act"), [("qwen3_moe", "silu"), ("gpt_oss", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gates_are_recognized_by_what_they_compute(
    kind: str, act: str | None, dtype: torch.dtype
) -> None:
    modules = build(small_config(kind)).modules()
    experts = next(one for one in modules if hasattr(one, "has_gate"))
    assert gate_of(experts, dtype, 48) == act
    assert gate_of(experts, dtype, 44) is None


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma3_text"])
def test_norms_of_ours_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model(small_config(kind)).bfloat16(), torch.arange(3, 40)[None]
    calls: list[torch.Size] = []
    norm = TorchOps.rms_norm

    def counted(self: TorchOps, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.shape)
        return norm(self, x, *args, **kwargs)

    monkeypatch.setattr(TorchOps, "rms_norm", counted)
    with torch.inference_mode():
        before = model(tokens, use_cache=False).logits
        assert not calls
        norm_by(TorchOps(), torch.bfloat16, model)
        assert torch.equal(before, model(tokens, use_cache=False).logits)
        assert len(calls) == len(rms_norms(model))
        model.float()(tokens, use_cache=False)  # what is of another dtype
    assert len(calls) == len(rms_norms(model))


def plainly(turning: Turning, x: Tensor, positions: Tensor, way: float) -> Tensor:
    """As the definition has it, pair by pair."""
    found = x.double().clone()
    for first, second, speed in zip(turning.first, turning.second, turning.speed, strict=True):
        angle = way * positions[0].double() * speed
        a, b = x[..., first].double(), x[..., second].double()
        found[..., first] = a * angle.cos() - b * angle.sin()
        found[..., second] = b * angle.cos() + a * angle.sin()
    return found


@pytest.mark.parametrize(
    ("first", "second", "views"),
    [((0, 1, 2), (3, 4, 5), True), ((0, 2, 4), (1, 3, 5), True), ((0, 1, 3), (2, 4, 5), False)],
)
def test_keys_turn_pair_by_pair(
    first: tuple[int, ...], second: tuple[int, ...], views: bool
) -> None:
    """Halves, neighbours and any others; what is in no pair stays."""
    turning = Turning(first, second, (1.0, -0.3, 0.01)[: len(first)])
    turner = Turners(torch.device("cpu")).of(turning, 40)
    assert turner is not None and isinstance(turner.first, slice) == views
    x, at = torch.randn(2, 3, 5, 8), torch.arange(30, 35).expand(2, -1)
    for one, way in ((turner.redo, 1.0), (turner.undo, -1.0)):
        assert torch.allclose(one(x, at).double(), plainly(turning, x, at, way), atol=1e-6)


def test_tables_are_made_once_a_layer_unless_they_are_too_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    of = Turner.of
    monkeypatch.setattr(Turner, "of", lambda *args: (made.append(args[1]), of(*args))[1])
    turners = Turners(torch.device("cpu"))
    for speed, longest in ((1.0, 40), (1.0, 30), (1.0, 50), (0.9, 20)):
        turners.of(Turning((0,), (1,), (speed,)), longest)
    assert turners.of(None, 9) is turners.of(Turning(), 9) is None
    assert made == [40, 50, 20]


@pytest.mark.parametrize("chosen", [True, False])
def test_segments_grow_where_the_driver_can_and_nobody_has_chosen(
    chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    cuda = torch.device("cuda")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if chosen:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setattr(memory, "_grow", told.append)

    def refusing(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("CUDA driver error: not supported\nmore")

    empty: Callable[..., Tensor] = torch.empty
    monkeypatch.setattr(torch, "empty", refusing)
    fallback = let_segments_grow(cuda)
    monkeypatch.setattr(torch, "empty", empty)
    assert told == ([] if chosen else ["True", "False"])
    assert (fallback and fallback.why) == (None if chosen else "CUDA driver error: not supported")
