"""Experts that are visited together: how their products are asked for, and who computes them. The
Triton kernel itself is tested on a GPU, in test_kernels_gpu.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from layersweep.errors import Fallback
from layersweep.kernels import Kernels
from layersweep.kernels.launch_triton import Launcher
from layersweep.model import compute
from layersweep.model.ops import CudaOps, Parts, TorchOps
from layersweep.stream import generic_shapes, shapes
from layersweep.sweep import feed, generic, visits
from layersweep.sweep.feed import FeedVisit, runs_within
from layersweep.sweep.model import Model, load

CPU = torch.device("cpu")
SPANS = [(0, 2), (2, 2), (2, 5)]


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo", device="cpu")


@pytest.fixture(scope="module", params=["auto", "generic"])
def either(request: pytest.FixtureRequest) -> Model:
    """By our own program, and by transformers' modules."""
    return load("demo", device="cpu", program=request.param)


# Where experts_at_once is asked; shapes of the plan must agree with the sweep.
SIZED = (shapes, generic_shapes, visits, generic)


@pytest.mark.parametrize("ops", [TorchOps(), CudaOps(cast(Kernels, None), CPU)])
def test_each_part_has_its_weight_and_its_bias(ops: TorchOps) -> None:
    x, weights, biases = torch.randn(5, 8), torch.randn(3, 6, 8), torch.randn(3, 6)
    out = ops.products(x, weights, biases, Parts(SPANS), torch.empty(5, 6))
    for row, part in enumerate((0, 0, 2, 2, 2)):
        wanted = weights[part].double() @ x[row].double() + biases[part].double()
        assert torch.allclose(out[row].double(), wanted, atol=1e-5)
    rows = torch.tensor([4, 0, 3, 3, 1])
    gathered = ops.products(x, weights, biases, Parts(SPANS), torch.empty(5, 6), rows)
    assert torch.equal(gathered, ops.products(x[rows], weights, biases, Parts(SPANS), out))


def test_one_launch_serves_groups_alone() -> None:
    """A single expert keeps its product, whose bits are those of studies that were measured."""
    asked = []

    def grouped(
        x: Tensor, index: Tensor | None, weights: Tensor, biases: Tensor | None,
        spans: Sequence[tuple[int, int]], ends: Tensor, out: Tensor,
    ) -> None:  # fmt: skip
        asked.append((spans, ends.tolist(), index))

    ops = CudaOps(cast(Kernels, None), CPU, grouped)
    x, weights, out = torch.ones(5, 8), torch.ones(3, 6, 8), torch.zeros(5, 6)
    assert ops.products(x, weights, None, Parts([(0, 5)]), out).eq(8).all() and asked == []
    parts = Parts(SPANS, torch.tensor([12, 12, 15]))
    assert ops.products(x, weights, None, parts, out) is out
    assert asked == [(SPANS, [12, 12, 15], None)]
    rows = torch.tensor([4, 0, 3, 3, 1])
    ops.products(x, weights, None, parts, out, rows)
    assert asked[1] == (SPANS, [12, 12, 15], rows)


def test_groups_change_no_number_and_know_their_ends_on_the_device(
    either: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [torch.randint(0, either.decoder.vocab_size, (60,)).tolist()]
    (alone,) = either.score(ids)
    for module in SIZED:
        monkeypatch.setattr(module, "experts_at_once", lambda *args, cpu: 3)
    one_by_one, sizes = TorchOps.products, []

    def spy(
        ops: TorchOps, x: Tensor, weights: Tensor, biases: Tensor | None, parts: Parts,
        memory: Tensor, rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert parts.ends is not None
        first = int(parts.ends[-1]) - parts.spans[-1][1]
        assert [last for _, last in parts.spans] == (parts.ends - first).tolist()
        sizes.append(len(weights))
        return one_by_one(ops, x, weights, biases, parts, memory, rows)

    monkeypatch.setattr(TorchOps, "products", spy)
    (together,) = either.score(ids)
    assert torch.equal(together, alone)
    assert set(sizes) == {3, 2}


EACH = [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize(
    ("most", "wanted"),
    [(10, [(0, 4)]), (9, [(0, 3), (3, 4)]), (4, [(0, 1), (1, 3), (3, 4)]), (2, EACH)],
)
def test_rows_of_a_group_go_in_runs(most: int, wanted: list[tuple[int, int]]) -> None:
    spans = [(5, 9), (9, 11), (11, 13), (13, 15)]
    assert [(run.start, run.stop) for run in runs_within(spans, most)] == wanted


def test_uneven_routing_changes_no_number(either: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group takes 3 x 7 rows at once here; its experts have some 15 of 60 x 2 each."""
    seeded = torch.Generator().manual_seed(0)  # some expert must have more than 21
    ids = [torch.randint(0, either.decoder.vocab_size, (60,), generator=seeded).tolist()]
    (whole,) = either.score(ids)
    for module in SIZED:
        monkeypatch.setattr(module, "experts_at_once", lambda *args, cpu: 3)
    monkeypatch.setattr(feed, "rows_at_once", lambda *args, cpu: 7)
    visits: dict[str, list[int]] = {"_together": [], "_alone": []}
    for name, noted in visits.items():
        real = getattr(FeedVisit, name)
        monkeypatch.setattr(
            FeedVisit, name, lambda *args, real=real, noted=noted: noted.append(real(*args))
        )
    (parts,) = either.score(ids)
    assert torch.allclose(parts, whole, atol=1e-4)  # products of other sizes round differently
    assert visits["_together"] and visits["_alone"]


def test_without_triton_each_expert_has_a_product_and_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "layersweep.kernels.grouped_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    grouped, fallbacks = compute._grouped_products(torch.device("cuda"), torch.float16)
    wanted, used = "grouped products in Triton", "a product per expert, slower"
    assert grouped is None
    assert [one[:3] for one in fallbacks] == [("experts", wanted, used)]
    assert "triton" in fallbacks[0].why


ONE, TWO = (1, 1, 1), (2, 1, 1)


def test_a_kernel_is_compiled_once_for_each_key() -> None:
    seen: list[object] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., dict[object, object]]:
            def compiled(*args: object, num_warps: int, num_stages: int) -> dict[object, object]:
                seen.append(("compiled", grid, args, num_warps, num_stages))
                return {of: lambda *args, of=of: seen.append((of, args)) for of in (ONE, TWO)}

            return compiled

    launch = Launcher(Kernel())
    for grid, stages in ((ONE, 3), (TWO, 3), (TWO, 4), (ONE, 3)):
        launch(grid, ("x", grid[0]), ("half",), warps=4, stages=stages)
    assert seen == [
        ("compiled", ONE, ("x", 1), 4, 3), (TWO, ("x", 2)),
        ("compiled", TWO, ("x", 2), 4, 4), (ONE, ("x", 1)),
    ]  # fmt: skip


def test_older_cards_and_float32_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def missing(device: torch.device, dtype: torch.dtype) -> tuple[None, tuple[Fallback, ...]]:
        asked.append(dtype)
        return None, (Fallback("experts", "one launch", "several", "a test"),)

    monkeypatch.setattr(compute, "_grouped_products", missing)
    monkeypatch.setattr(compute, "_kernel_ops", lambda *args: (TorchOps(), ()))
    for capability, dtype, groups, told in (
        ((8, 0), torch.bfloat16, True, ["experts"]),
        ((8, 0), torch.bfloat16, False, []),
        ((9, 0), torch.float32, True, []),
        ((7, 5), torch.float16, True, []),
    ):
        device = torch.device("cuda")
        made = compute.choose_compute(device, dtype, assume_capability=capability, groups=groups)
        assert [one.what for one in made.fallbacks] == told
    assert asked == [torch.bfloat16]


def test_the_path_says_how_many_experts_share_a_launch(demo: Model) -> None:
    assert demo.paths.experts == "one dense expert at a time, all tiles"
    gpu = replace(demo.compute, device=torch.device("cuda"), dtype=torch.float16)
    at_once = demo.decoder.num_experts  # 8, of which each row visits 2
    assert replace(demo, compute=gpu).paths.experts == (
        f"{at_once} dense experts at a time, a product each, all tiles"
    )
    ops = TorchOps()
    ops.grouped = lambda *args: None
    assert replace(demo, compute=replace(gpu, ops=ops)).paths.experts == (
        f"grouped products in Triton, {at_once} at once"
    )
