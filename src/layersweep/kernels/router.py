"""Kernels that choose each row's experts and sort rows by expert; see router.cu. They are compiled
for a number of experts, up to 512."""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.kernels.codecs import same
from layersweep.kernels.weights import WeightKernels

MAX_EXPERTS, MAX_CHOSEN = 512, 32  # a lane of a warp for each that is chosen
SORTED_TOGETHER = 256  # rows of a block that sorts them
_CHOOSING = 8  # rows of a block that chooses their experts, a warp each
ROUTER_LAYOUTS = {
    "router": {
        "choose_experts": "4P5if",
        "choose_experts_f32": "4P5if",
        "count_rows": "2P2i",
        "sort_rows": "7P2i",
    },
}


class RouterKernels(WeightKernels):
    """The part of `Kernels` that routes rows. T: the module's compute dtype."""

    def routes(self, experts: int, top_k: int) -> bool:
        """Whether the kernels take so many."""
        return experts <= MAX_EXPERTS and top_k <= MAX_CHOSEN

    def choose_experts(
        self,
        logits: Tensor,
        top_k: int,
        *,
        over_chosen: bool,
        normalize: bool,
        scale: float,
        rounds: bool,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights float32 and experts int32 [N, K], the best first, of equal ones the lowest.

        logits T or float32 [N, E]; bias float32 [E], added to them. The weights are a softmax, of
        all logits or `over_chosen`; they may be divided by their sum, then multiplied by `scale`,
        then rounded to T. NaN is above everything. Oracle: model.routing.choose_experts.
        """
        rows, experts = logits.shape
        same(logits, logits.dtype)
        assert logits.dtype in (self.dtype, torch.float32)
        assert top_k <= experts and self.routes(experts, top_k)
        if bias is not None:
            same(bias, torch.float32)
            assert bias.shape == (experts,)
        weights = torch.empty(rows, top_k, dtype=torch.float32, device=logits.device)
        chosen = torch.empty_like(weights, dtype=torch.int32)
        if rows == 0:
            return weights, chosen
        name = "choose_experts" + ("" if logits.dtype == self.dtype else "_f32")
        pointers, rules = (logits, bias, weights, chosen), (over_chosen, normalize, rounds, scale)
        args = (*pointers, rows, top_k, *rules)
        grid = (-(-rows // _CHOOSING), 1, 1)
        self._module("router", experts).launch(name, grid, 32 * _CHOOSING, args)
        return weights, chosen

    def sort_by_expert(
        self, experts: Tensor, weights: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows, weights, ends, places) as model.routing.sort_by_expert gives them.

        experts int32 [N, K] below `num_experts`, those of a row distinct; weights float32 [N, K].
        """
        count, top_k = experts.shape
        same(experts, torch.int32)
        same(weights, torch.float32)
        assert weights.shape == experts.shape and self.routes(num_experts, top_k)
        rows = torch.empty(count * top_k, dtype=torch.int64, device=experts.device)
        sorted_weights = torch.empty_like(rows, dtype=torch.float32)
        places = torch.empty_like(experts)
        blocks = -(-count // SORTED_TOGETHER)
        if blocks == 0:
            return rows, sorted_weights, rows.new_zeros(num_experts), places
        ends = rows.new_empty(num_experts)
        counts = experts.new_empty(blocks, num_experts)
        module, sizes = self._module("router", num_experts), (count, top_k)
        grid = (blocks, 1, 1)
        module.launch("count_rows", grid, SORTED_TOGETHER, (experts, counts, *sizes))
        pointers = (experts, weights, counts, rows, sorted_weights, ends, places)
        module.launch("sort_rows", grid, SORTED_TOGETHER, (*pointers, *sizes))
        return rows, sorted_weights, ends, places
