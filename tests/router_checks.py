"""router.cu against torch; emulated on the CPU and real on a GPU alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from kernel_checks import draw, exactly, within

from layersweep.families.spec import Router
from layersweep.kernels import Kernels
from layersweep.model.ops import CudaOps, TorchOps
from layersweep.model.routing import sort_by_expert

ROUTERS = (
    Router(8, normalize=True),
    Router(8, normalize=False, scale=2.5),
    Router(11, normalize=True, scale=0.3),
    Router(1),
    Router(4, "softmax_topk", bias=True),
    Router(32, "softmax_topk"),
)


def check_choose_experts(
    kernels: Kernels, device: torch.device, rows: int, experts: int, router: Router, seed: int
) -> None:
    """The experts of a stable sort, the weights of torch's arithmetic, whatever the dtypes."""
    router = replace(router, top_k=min(router.top_k, experts))
    # steps of 2^-10: what differs, differs in its softmax too
    drawn = (3072 * draw(seed, rows, experts, device=device)).round() / 1024
    bias = (1024 * draw(seed + 1, experts, device=device)).round() / 1024 if router.bias else None
    given = [drawn, drawn.to(kernels.dtype), drawn.round()]  # the last with many ties
    dtypes = torch.float32, kernels.dtype, torch.float32
    for logits, dtype in zip(given, dtypes, strict=True):
        ops = CudaOps(kernels, device)
        weights, chosen = ops.choose_experts(logits, router, dtype, bias)
        scores = logits.float() if bias is None else logits.float() + bias
        ordered = scores.sort(dim=-1, descending=True, stable=True)
        exactly(chosen, ordered.indices[:, : router.top_k].int(), seed)
        if router.score == "softmax":
            scores = scores.softmax(-1)
        wanted = scores.gather(1, chosen.long())
        if router.score == "softmax_topk":
            wanted = wanted.softmax(-1)
        elif router.normalize:
            wanted = wanted / wanted.sum(-1, keepdim=True)
        wanted = (wanted * router.scale).to(dtype)
        assert weights.dtype == torch.float32 and torch.equal(weights, weights.to(dtype).float())
        # on the CPU torch has another exp, and adds in another order
        steps, equal = (2, 0.9) if device.type == "cuda" else (6, 0.0)
        within(weights.to(dtype), wanted, steps if dtype == torch.float32 else 1, seed, equal)


def check_choose_experts_at_edges(kernels: Kernels, device: torch.device, experts: int) -> None:
    """Ties, infinities and NaN: ids are distinct and in range, weights NaN as torch's are."""
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(6, experts, device=device)
    logits[1, 37], logits[2, 5], logits[3], logits[4, 39] = nan, inf, -inf, -inf
    logits[5, :2], logits[5, 2:] = torch.tensor([-200.0, 0.0]), -200.0
    for router in (Router(3), Router(3, normalize=False), Router(3, "softmax_topk")):
        weights, chosen = CudaOps(kernels, device).choose_experts(logits, router, torch.float32)
        wanted = TorchOps().choose_experts(logits, router, torch.float32)[0]
        torch.testing.assert_close(weights, wanted, equal_nan=True, rtol=1e-6, atol=0)
        by_logit = router.score == "softmax_topk"
        # a softmax over all makes a row with NaN or infinity NaN: its experts are equal
        broken = [[37, 0, 1], [5, 0, 1]] if by_logit else [[0, 1, 2], [0, 1, 2]]
        assert chosen.tolist() == [[0, 1, 2], *broken, [0, 1, 2], [0, 1, 2], [1, 0, 2]]


def check_sort_by_expert(
    kernels: Kernels, device: torch.device, rows: int, experts: int, per_token: int, seed: int
) -> None:
    """Equal to torch's stable sort, with experts that nobody or everybody takes."""
    scores = draw(seed, rows, experts, device=device)
    scores[:, experts // 2] += 9
    scores[: rows // 2, 0] -= 99
    weights, chosen = scores.topk(per_token, dim=-1)
    found = CudaOps(kernels, device).sort_by_expert(chosen, weights, experts)
    wanted = sort_by_expert(chosen, weights, experts)
    for name in ("rows", "weights", "ends", "places"):
        exactly(getattr(found, name), getattr(wanted, name), seed)
