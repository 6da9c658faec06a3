"""Which experts a token goes to, and with which weights, for every router of spec.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.families.spec import Router


@dataclass
class Routing:
    """N rows sorted by expert, then by their number: rows[start[e]:start[e+1]] go to expert e.

    rows int64 [N*K]; weights float32 [N*K] belong to them. ends int64 [E] is `start` on the device,
    until `settle` has brought it to the host. places int32 [N, K]: where each of the N rows stands
    in `rows`, ascending, which is the order of its experts.
    """

    rows: Tensor
    weights: Tensor
    ends: Tensor
    places: Tensor
    start: list[int] = field(default_factory=list)

    @staticmethod
    def settle(routings: Sequence[Routing]) -> None:
        """Bring the counts of all tiles to the host: one small copy per layer."""
        if routings:
            for routing, ends in zip(
                routings, torch.stack([r.ends for r in routings]).tolist(), strict=True
            ):
                routing.start = [0, *ends]


def choose_experts(
    logits_NE: Tensor,
    router: Router,
    dtype: torch.dtype,
    bias_E: Tensor | None = None,
    correction_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights, float32 but rounded to `dtype`, and experts, both [N, K], the best first.

    Of equal experts torch's topk may take any on the CPU, on a GPU the lowest.
    """
    assert (bias_E is not None) == router.bias
    assert (correction_E is not None) == router.correction
    logits = logits_NE.float()
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
    return weights.to(dtype).float(), experts


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


def sort_by_expert(experts_NK: Tensor, weights_NK: Tensor, num_experts: int) -> Routing:
    """Stable, and without synchronization. The experts of a row are distinct."""
    per_token = experts_NK.shape[1]
    # eight bits are one pass of the device's radix sort, 64 would be eight
    keys = experts_NK.flatten().to(torch.uint8 if num_experts <= 256 else torch.int32)
    by_expert, order = keys.sort(stable=True)
    experts = torch.arange(num_experts, device=keys.device, dtype=torch.int32)
    ends = torch.searchsorted(by_expert.int(), experts, right=True)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    places = places.view(-1, per_token).sort(dim=1).values
    return Routing(order // per_token, weights_NK.flatten()[order].float(), ends, places)
