"""Every kind of attention and of feed on a GPU, beside the CPU: tiny models of tests/families.

python -m pytest -m gpu tests/test_families_gpu.py
"""

from __future__ import annotations

import pytest
import torch
from families import ours
from families.checks import Subject
from families.probe import Losses
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.arms import parse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# full, window, softcap, two thetas, sinks, q/k norm, part of a head, latents; dense and experts
KINDS = (
    *("llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3", "glm4"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_moe", "mixtral", "qwen2_moe", "phi3"),
)
CLOSE = 2e-3  # nats of a token; logits of these models are peaked
# In float16 a token near the edge between two experts goes to the other one, which these models,
# of random weights, answer with another guess altogether: few tokens may, and the median is close.
HALF_MEDIAN, HALF_FAR, FEW = 0.03, 0.5, 0.1
each = pytest.mark.parametrize("family", KINDS, indirect=True)


def apart(a: Losses, b: Losses) -> float:
    return max((a.windows - b.windows).abs().max().item(), (a.needle - b.needle).abs().max().item())


@each
@pytest.mark.parametrize("capability", [None, "7.5"])
def test_float32_equals_the_cpu(family: Subject, capability: str | None) -> None:
    cpu = ours.opened(family.folder)
    try:
        gpu = ours.opened(family.folder, device="cuda", dtype="float32", capability=capability)
    except InputError as refusal:
        assert capability and "needed" in str(refusal)
        return
    assert apart(ours.losses(gpu), ours.losses(cpu)) < CLOSE
    assert apart(ours.losses(gpu, streaming=True), ours.losses(cpu, streaming=True)) < CLOSE
    arm = parse("lloyd:K8V8")  # a value at a boundary between levels may go to the other side
    assert apart(ours.losses(gpu, arm), ours.losses(cpu, arm)) < 50 * CLOSE


@each
@pytest.mark.parametrize("capability", [None, "7.5"])
def test_float16_is_close_to_the_cpu(family: Subject, capability: str | None) -> None:
    cpu = ours.losses(ours.opened(family.folder))
    try:
        model = ours.opened(family.folder, device="cuda", dtype="float16", capability=capability)
    except InputError as refusal:
        assert capability and "needed" in str(refusal)
        return
    gpu = ours.losses(model)
    moved = (gpu.windows - cpu.windows).abs()
    assert moved.median() < HALF_MEDIAN
    assert (moved > HALF_FAR).float().mean() < FEW
    for kv in ("trellis:K3V2@sink=4", "lloyd:K4V4@window=8"):
        assert _finite(ours.losses(model, parse(kv)).windows)


@each
def test_a_token_at_a_time_equals_the_cpu(family: Subject) -> None:
    cpu = ours.stepped_losses(ours.opened(family.folder))
    gpu = ours.stepped_losses(ours.opened(family.folder, device="cuda", dtype="float32"))
    assert (gpu.cpu() - cpu).abs().max() < CLOSE


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
