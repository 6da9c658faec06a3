"""What bare arms add, predictions, coordinates and found sinks, on a GPU beside the CPU.

python -m pytest -m gpu tests/test_fit_gpu.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from studies import perplexity_of
from test_kv_fit import DIM, GROUPS, TOKENS, layer
from torch import Tensor

import layersweep
from layersweep.kv import parse, sinks
from layersweep.kv.fit import Fit, fit
from layersweep.kv.store import KvStore
from layersweep.kv.stream import Stream, keys_and_values
from layersweep.study.run import run_study
from layersweep.study.study import prepare_study
from layersweep.sweep.model import Model
from layersweep.tasks.settings import EvalSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
ARMS = ("K3V2", "K4V2")


def fitted(dtype: torch.dtype, device: torch.device = CUDA) -> Fit:
    k, v, white = layer(TOKENS)
    seen = torch.diag_embed(torch.logspace(1, -1, DIM).expand(GROUPS, -1))
    k, v, weight = k.to(device, dtype), v.to(device, dtype), torch.ones(GROUPS, TOKENS)
    return fit(k, v, weight.to(device), seen.to(device), white.to(device))


def told(dtype: torch.dtype) -> tuple[Stream, Stream]:
    found, (keys, values) = fitted(dtype), keys_and_values(GROUPS, DIM)
    return replace(keys, basis=found.keys), replace(values, prediction=found.values)


def pair(dtype: torch.dtype, tokens: int = 203) -> tuple[Tensor, Tensor]:
    """Two sequences, heads side by side in memory, every tenth token much like the first."""
    k, v, _ = layer(2 * tokens, seed=5)
    every = (x.view(GROUPS, 2, tokens, DIM).permute(1, 2, 0, 3).contiguous() for x in (k, v))
    both = []
    for x in every:
        x[:, ::10] = x[:, :1] + 0.01 * x[:, ::10]
        both.append(x.to(CUDA, dtype).transpose(1, 2))
    return both[0], both[1]


def read(arms: tuple[str, ...], dtype: torch.dtype, pieces: list[int]) -> list[Tensor]:
    """What attention reads of each arm's keys and values, appended in pieces."""
    store = KvStore.empty([(parse(arm), told(dtype)) for arm in arms], 0, 1, mean_tokens=100)
    for k, v in zip(*(torch.split(x, pieces, dim=2) for x in pair(dtype)), strict=True):
        store = store.appended((k, v))
    return [x for arm in range(len(arms)) for x in store.decoded(arm)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_kernels_find_and_move_sinks_as_torch_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, real, calls = read(ARMS, dtype, [203]), sinks._kernels, []
    monkeypatch.setattr(sinks, "_kernels", lambda *key: calls.append(real(*key)))
    assert all(map(torch.equal, fast, read(ARMS, dtype, [203])))
    assert calls and None not in calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arm", ["trellis:K3V2@found=1", "trellis:K3V2@found=1@fine=32"])
def test_a_cache_that_grows_predicts_what_one_made_at_once_does(
    arm: str, dtype: torch.dtype
) -> None:
    """Products of other shapes may differ in the last bit, and a code at a boundary then: few."""
    whole, grown = read((arm,), dtype, [203]), read((arm,), dtype, [140, 1, 62])
    for one, another in zip(whole, grown, strict=True):
        apart = (one.float() - another.float()).norm(dim=-1)
        assert (apart > 0.02 * one.float().norm(dim=-1)).float().mean() < 0.01


def test_predictions_of_halves_are_those_of_floats() -> None:
    (k, v), other = pair(torch.float16), layer(50, seed=6)[0][None].to(CUDA, torch.float16)
    half, single = (fitted(dtype).values for dtype in (torch.float16, torch.float32))
    assert half.weight.dtype == torch.float16 and half.values(other).dtype == torch.float32
    apart = half.values(other) - single.values(other)
    assert apart.abs().max() < 5e-3 * single.values(other).abs().max()
    left = half.left(v, k)
    assert left.is_contiguous() and left.square().mean() < 0.2 * v.float().square().mean()


def test_nothing_waits_for_the_device() -> None:
    read(ARMS, torch.float16, [203])  # compiles, copies tables
    x, arms = pair(torch.float16), [(parse(arm), told(torch.float16)) for arm in ARMS]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        store = KvStore.empty(arms, 0, 1).appended(x)
        for arm in range(len(arms)):
            store.pieces(arm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def divergences(model: Model) -> dict[str, float]:
    """Mean KL of each arm's predictions, nats."""
    settings = EvalSettings(
        kv=",".join(ARMS), segments=40, prefix=256, continuation=128, tasks=("ppl",), gate="off"
    )
    study = prepare_study(model, settings)
    run_study(study)
    return {arm: float(kl.mean()) for arm, kl in perplexity_of(study).numbers.kl.items()}


def test_bare_arms_cost_as_much_on_a_gpu_as_on_the_cpu() -> None:
    cpu = divergences(layersweep.load("demo", device="cpu"))
    for dtype in ("float32", "float16"):
        gpu = divergences(layersweep.load("demo", device="cuda", dtype=dtype))
        print(dtype, gpu, cpu)
        for arm in (f"trellis:{bits}@fit=1@found=1" for bits in ARMS):
            assert gpu[arm] == pytest.approx(cpu[arm], rel=0.05), (arm, dtype)
