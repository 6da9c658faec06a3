"""Norms, activations and routers in plain torch, against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from layersweep.families.spec import Activation, Router
from layersweep.kernels import Kernels
from layersweep.kernels.runtime import Module
from layersweep.model import maths
from layersweep.model.ops import CudaOps, TorchOps
from layersweep.model.routing import choose_experts

DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, EXPERTS, ROWS = 32, 24, 40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset, module", [(0.0, LlamaRMSNorm), (1.0, Gemma2RMSNorm)])
def test_norms(offset: float, module: type[nn.Module], dtype: torch.dtype) -> None:
    x, weight = (3 * torch.randn(9, HIDDEN)).to(dtype), torch.randn(HIDDEN).to(dtype)
    norm = module(HIDDEN, 1e-6).to(dtype)
    norm.weight.data = weight
    found = TorchOps().rms_norm(x, weight, 1e-6, x, offset=offset)
    assert found.dtype == dtype and torch.equal(found, norm(x))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "act, theirs",
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu2", "relu2")],
)
def test_activations(act: Activation, theirs: str, dtype: torch.dtype, interleaved: bool) -> None:
    gate, up = (3 * torch.randn(2, 9, HIDDEN)).to(dtype)
    together = (
        torch.stack((gate, up), dim=-1).flatten(1) if interleaved else torch.cat((gate, up), 1)
    )
    found = TorchOps().swiglu_(together, act, interleaved=interleaved)
    assert found.data_ptr() == together.data_ptr() and found.stride() == (2 * HIDDEN, 1)
    # torch's GELU of a half of a row differs from that of contiguous memory in 1 + erf's last bits.
    last_bits = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, ACT2FN[theirs](gate) * up, rtol=last_bits, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_clamped_swiglu_of_gpt_oss(dtype: torch.dtype) -> None:
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, num_local_experts=2, swiglu_limit=2.0
    )
    x = (3 * torch.randn(9, 2 * HIDDEN)).to(dtype)
    assert (x > 2).any() and (x < -2).any()
    wanted = GptOssExperts(config)._apply_gate(x)
    halves = torch.cat((x[:, ::2], x[:, 1::2]), dim=1)
    for rows, interleaved in ((x, True), (halves, False)):
        found = TorchOps().swiglu_(rows, "swiglu_clamped", interleaved=interleaved, limit=2.0)
        assert found.data_ptr() == rows.data_ptr() and torch.equal(found, wanted)


def drawn(module: nn.Module) -> nn.Module:
    for one in [*module.parameters(), *module.buffers()]:
        one.data = torch.randn_like(one) * (1.0 if one.dim() == 2 else 0.3)
    return module


def sorted_by_expert(weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    order = experts.argsort(-1)
    return weights.gather(-1, order), experts.gather(-1, order)


def same_routing(module: nn.Module, router: Router, dtype: torch.dtype = torch.float32) -> Tensor:
    """Our weights; the same experts, weights within 1e-6."""
    module = drawn(module).to(dtype)
    x = torch.randn(ROWS, HIDDEN).to(dtype)
    logits, weights, experts = module(x)
    correction = getattr(module, "e_score_correction_bias", None) if router.correction else None
    bias = module.bias if router.bias else None
    ours = maths.linear(x.to(module.weight.dtype), module.weight)
    atol = 1e-5 if bias is None else 0.1
    biased = ours.float() if bias is None else ours.float() + bias.float()
    torch.testing.assert_close(biased, logits.float(), rtol=0, atol=atol)
    found, chosen = choose_experts(ours, router, weights.dtype, bias, correction)
    ours, theirs = sorted_by_expert(found, chosen), sorted_by_expert(weights, experts)
    assert torch.equal(ours[1], theirs[1]) and found.dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0].float(), rtol=0, atol=1e-6)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_over_all_experts(normalize: bool, dtype: torch.dtype) -> None:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=5, norm_topk_prob=normalize
    )
    weights = same_routing(Qwen3MoeTopKRouter(config), Router(5, normalize=normalize), dtype)
    assert (abs(weights.float().sum(-1) - 1).max() < 0.02) == normalize


def test_softmax_over_the_chosen_logits_with_a_bias() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=4)
    same_routing(GptOssTopKRouter(config), Router(4, "softmax_topk", bias=True))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("groups, open_groups", [(4, 2), (1, 1)])
def test_sigmoid_with_a_correction_in_groups(
    groups: int, open_groups: int, normalize: bool
) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=6, n_group=groups,
        topk_group=open_groups, norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = Router(
        6, "sigmoid", normalize, scale=2.5, correction=True, groups=groups,
        top_groups=open_groups, group_score="top2",
    )  # fmt: skip
    same_routing(DeepseekV3TopkRouter(config), router)


@pytest.mark.parametrize("groups, open_groups", [(4, 2), (1, 1)])
def test_softmax_in_groups_judged_by_their_best_expert(groups: int, open_groups: int) -> None:
    config = DeepseekV2Config(
        hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=6, n_group=groups,
        topk_group=open_groups, routed_scaling_factor=1.5,
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
    )  # fmt: skip
    router = Router(6, normalize=False, scale=1.5, groups=groups, top_groups=open_groups)
    same_routing(DeepseekV2TopkRouter(config), router)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_float", [True, False])
def test_mixtrals_routing_keeps_its_bits(keep_float: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(ROWS, HIDDEN).to(dtype), torch.randn(8, HIDDEN).to(dtype)
    logits = maths.linear(x, weight).float()
    best, experts = logits.softmax(-1).topk(2, dim=-1)
    kept = torch.float32 if keep_float else dtype
    weights = (best / best.sum(-1, keepdim=True)).to(kept)
    found, chosen = choose_experts(maths.linear(x, weight), Router(2), kept)
    assert torch.equal(found, weights.float()) and torch.equal(chosen, experts)


@pytest.mark.parametrize(
    "router",
    [
        Router(4, "sigmoid"),
        Router(4, correction=True),
        Router(4, groups=4, top_groups=2),
        Router(33),
    ],
    ids=str,
)
def test_routers_that_no_kernel_takes_are_left_to_torch(router: Router) -> None:
    def no_module(name: str, dim: int = 0) -> Module:
        raise AssertionError(name)

    ops = CudaOps(Kernels(torch.float32, no_module), torch.device("cpu"))
    logits, correction = torch.randn(ROWS, 40), torch.randn(40) if router.correction else None
    given = logits, router, torch.float32, None, correction
    found, wanted = ops.choose_experts(*given), choose_experts(*given)
    assert all(map(torch.equal, found, wanted))
    found, wanted = (one.sort_by_expert(wanted[1], wanted[0], 513) for one in (ops, TorchOps()))
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.places, wanted.places)


def test_sigmoids_that_are_all_zero_share_nothing() -> None:
    weight = torch.full((8, HIDDEN), -10.0)
    logits = maths.linear(torch.ones(16, HIDDEN), weight)
    weights, _ = choose_experts(logits, Router(2, "sigmoid"), torch.float32)
    assert torch.equal(weights, torch.zeros(16, 2))
