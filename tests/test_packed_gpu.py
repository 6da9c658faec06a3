"""Attention that reads codes where they lie, on a real GPU, against decoding first on that GPU.

python -m pytest -m gpu tests/test_packed_gpu.py
"""

from __future__ import annotations

import random

import pytest
import torch
from packed_checks import ROPES, Case, check_lengths, check_packed

from layersweep.kernels import Kernels, load_kernels
from layersweep.kernels.packed import packed_refusal

DEVICE = torch.device("cuda:0")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if why := packed_refusal(DEVICE, 128, 3):
        pytest.skip(why)
    return load_kernels(DEVICE, request.param)


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    print(f"seed {chosen}")
    return chosen


@pytest.mark.parametrize("ratio", [1, 4, 7, 8])
@pytest.mark.parametrize("arm", ["K3V2", "K2V3", "K4V4", "K4V2@found=0@sink=0@fine=0"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention_over_codes(kernels: Kernels, dim: int, arm: str, ratio: int, seed: int) -> None:
    for tokens in (151, 1033, 4097):
        check_packed(kernels, DEVICE, Case(dim, 2, ratio, 3), arm, tokens, seed)


@pytest.mark.parametrize("rope", [*ROPES, None])
def test_every_rope(kernels: Kernels, rope: str | None, seed: int) -> None:
    check_packed(kernels, DEVICE, Case(128, 2, 20, rope=rope), "K3V2", 3001, seed)


def test_many_heads(kernels: Kernels, seed: int) -> None:
    check_packed(kernels, DEVICE, Case(128, 8, 8, 1), "K3V2", 20_003, seed)


def test_caps_and_sinks(kernels: Kernels, seed: int) -> None:
    case = Case(128, 2, 4)
    check_packed(kernels, DEVICE, case, "K3V2", 900, seed, softcap=5.0, sinks=True, predicted=False)


def test_sequences_of_other_lengths(kernels: Kernels, seed: int) -> None:
    check_lengths(kernels, DEVICE, Case(128, 2, 4, 4), seed)
