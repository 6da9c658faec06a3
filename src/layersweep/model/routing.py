"""Which experts a token goes to, and with which weights, for every router of spec.py."""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.families.spec import Router
from layersweep.model.maths import linear


def route(
    x_NH: Tensor,
    weight_EH: Tensor,
    router: Router,
    *,
    keep_float: bool,
    bias_E: Tensor | None = None,
    correction_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits [N, E] (float32), weights [N, K] and experts [N, K].

    The product has the weight's dtype: a router kept in float32 (DeepSeek, GLM) gets rows in
    float32. `keep_float` leaves the weights of experts in float32, else they take x's dtype.
    """
    assert (bias_E is not None) == router.bias
    assert (correction_E is not None) == router.correction
    logits = linear(x_NH.to(weight_EH.dtype), weight_EH).float()
    if bias_E is not None:
        logits = logits + bias_E.float()
    if router.score == "softmax_topk":
        best, experts = logits.topk(router.top_k, dim=-1)
        weights = best.softmax(-1)
    else:
        scores = logits.sigmoid() if router.score == "sigmoid" else logits.softmax(-1)
        weights, experts = _best(scores, router, correction_E)
        if router.normalize:
            # DeepSeek's guard: sigmoids of very negative logits may all be 0.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if router.scale != 1.0:
        weights = weights * router.scale
    return logits, weights if keep_float else weights.to(x_NH.dtype), experts


def _best(scores_NE: Tensor, router: Router, correction_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores and indices [N, K] of the chosen experts, best first."""
    if correction_E is None and router.groups == 1:
        return scores_NE.topk(router.top_k, dim=-1)
    chances = scores_NE if correction_E is None else scores_NE + correction_E.float()
    if router.groups > 1:
        chances = chances.masked_fill(~_open(chances, router), float("-inf"))
    experts = chances.topk(router.top_k, dim=-1).indices
    return scores_NE.gather(-1, experts), experts


def _open(chances_NE: Tensor, router: Router) -> Tensor:
    """[N, E] True for the experts of a token's best groups (DeepSeek-V2, 2024, section 2.2.2)."""
    grouped = chances_NE.view(len(chances_NE), router.groups, -1)
    best = grouped.topk(2 if router.group_score == "top2" else 1, dim=-1).values.sum(-1)
    chosen = best.topk(router.top_groups, dim=-1).indices
    is_open = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True)
    return is_open[..., None].expand_as(grouped).flatten(-2)
