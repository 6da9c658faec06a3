"""The operations of a sweep: plain torch, the oracle, and the same with our CUDA kernels.

Names that end in an underscore overwrite their first argument. `memory` is where a result may
be put; what counts is what is returned. Legend as in maths.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layersweep.checkpoint.storage import Packed
from layersweep.families.spec import Activation, Router
from layersweep.model import maths, routing
from layersweep.model.routing import Routing

if TYPE_CHECKING:
    from layersweep.kernels import Kernels
    from layersweep.kernels.weights import Alike

NEVER = torch.iinfo(torch.int32).max  # "no bad layer": smaller numbers win

# (x, index, weights, biases, spans, ends, out), see kernels.grouped_triton
GroupedProducts = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, Sequence[tuple[int, int]], Tensor, Tensor], None
]


@dataclass(frozen=True)
class Parts:
    """Rows of one expert or several, one part after the other: `spans` of them, first to last.

    `ends` [parts]: where they end, on the device and counted from anywhere; None: one launch for
    all parts is not asked for.
    """

    spans: Sequence[tuple[int, int]]
    ends: Tensor | None = None


class TorchOps:
    """Every operation in plain torch, on any device."""

    name = "torch"
    grouped: GroupedProducts | None = None

    def decode(self, packed: Packed, out: Tensor) -> None:
        """Fill `out` with the dense weight."""
        packed.decode(out)

    def linear(
        self,
        x_NI: Tensor,
        weight_OI: Tensor,
        memory: Tensor | None = None,
        bias_O: Tensor | None = None,
    ) -> Tensor:
        """x times weight, transposed, plus the bias: [N, O]."""
        found = maths.linear(x_NI, weight_OI)
        return found if bias_O is None else found.add_(bias_O)

    def products(
        self,
        x_NI: Tensor,
        weights_POI: Tensor,
        biases_PO: Tensor | None,
        parts: Parts,
        memory_NO: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The rows of each part times a weight of its own, transposed, plus its bias if there are
        any; in `memory`. With an index `rows`, those rows of x are the parts' own. Weights, and
        biases, may have numbers of others between them."""
        x_NI = x_NI if rows is None else x_NI[rows]
        for part, (first, last) in enumerate(parts.spans):
            if first == last:
                continue
            own = memory_NO[first:last]
            bias = None if biases_PO is None else biases_PO[part]
            found = self.linear(x_NI[first:last], weights_POI[part], own, bias)
            if found.data_ptr() != own.data_ptr():
                own.copy_(found)
        return memory_NO

    def add_linear_(self, residual_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> None:
        residual_NO += maths.linear(x_NI, weight_OI)

    def logits(self, x_NH: Tensor, head_VH: Tensor, memory: Tensor | None = None) -> Tensor:
        """[N, V] float32, never rounded to 16 bits on the way."""
        if x_NH.dtype == torch.float32:
            return maths.linear(x_NH, head_VH)
        return torch.mm(x_NH, head_VH.t(), out_dtype=torch.float32)

    def rms_norm(
        self,
        x: Tensor,
        weight_H: Tensor,
        eps: float,
        memory: Tensor,
        rows: Tensor | None = None,
        *,
        offset: float = 0.0,
    ) -> Tensor:
        """Normed rows of x, all or those of the index `rows`: [N, H]."""
        return maths.rms_norm(x if rows is None else x[rows], weight_H, eps, offset)

    def rope(
        self,
        x_BHTD: Tensor,
        cos_SR: Tensor,
        sin_SR: Tensor,
        first: int,
        out: Tensor,
        *,
        interleaved: bool = False,
        branched: tuple[int, int] | None = None,
    ) -> Tensor:
        """Heads rotated to the positions from `first` on, into `out` (which may be x); only
        their first R coordinates turn. `branched` (P, L): tokens from P on are branches of L
        tokens, each of which continues the first P."""
        x, tokens = x_BHTD.to(out.dtype), x_BHTD.shape[2]
        prefix, length = branched or (tokens, 1)
        own = [slice(first + prefix, first + prefix + length)] * ((tokens - prefix) // length)
        places = slice(first, first + prefix), *own
        tables = [torch.cat([one[place] for place in places]) for one in (cos_SR, sin_SR)]
        return out.copy_(maths.rope(x, *tables, interleaved=interleaved))

    def swiglu_(
        self,
        gate_up_N2I: Tensor,
        act: Activation = "silu",
        *,
        interleaved: bool = False,
        limit: float = 0.0,
    ) -> Tensor:
        """act(gate) * up over the first I columns; those [N, I], a view. See maths.glu_."""
        return maths.glu_(gate_up_N2I, act, interleaved=interleaved, limit=limit)

    def choose_experts(
        self,
        logits_NE: Tensor,
        router: Router,
        dtype: torch.dtype,
        bias_E: Tensor | None = None,
        correction_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights, float32 but rounded to `dtype`, and experts, both [N, K], the best first."""
        return routing.choose_experts(logits_NE, router, dtype, bias_E, correction_E)

    def sort_by_expert(self, experts_NK: Tensor, weights_NK: Tensor, num_experts: int) -> Routing:
        """Rows sorted by expert, then by their number. No synchronization. The experts of a row are
        distinct and below `num_experts`."""
        return routing.sort_by_expert(experts_NK, weights_NK, num_experts)

    def add_rows_(self, update: Tensor, rows: Tensor, y_NH: Tensor, weight_N: Tensor) -> None:
        """update[rows] += y * weight; rows are unique, so no order of additions is left open."""
        update[rows] += (y_NH * weight_N[:, None]).to(y_NH.dtype)

    def add_places_(
        self, update: Tensor, places_NK: Tensor, first: int, y: Tensor, weight: Tensor
    ) -> None:
        """update[n] += y[p] * weight[p] for each place first + p in places[n], ascending, that y
        has; rounded after each addition, as if its experts came one after the other."""
        for place in places_NK.unbind(dim=1):
            rows = ((place >= first) & (place < first + len(y))).nonzero()[:, 0]
            own = place[rows].long() - first
            self.add_rows_(update, rows, y[own], weight[own])

    def leave_layer_(
        self, hidden: Tensor, update: Tensor, unit_N: Tensor, first_bad: Tensor, layer: int
    ) -> None:
        """hidden += update, update = 0; units with a non-finite row get `layer` in `first_bad`
        (int32, NEVER so far), if it is their first."""
        hidden += update
        update.zero_()
        bad = ~hidden.abs().amax(-1).isfinite()
        seen = torch.where(bad, layer, NEVER).to(torch.int32)
        first_bad.scatter_reduce_(0, unit_N.long(), seen, "amin")

    def losses(self, logits_TV: Tensor, target_T: Tensor) -> Tensor:
        """Loss of each target in nats: [T]."""
        return maths.losses(logits_TV, target_T)

    def score_branches(self, logits: list[Tensor], target: Tensor) -> Tensor:
        """[branches, T, 3]: loss, KL from the first branch, agreement; see maths."""
        return maths.score_branches(logits, target)


class CudaOps(TorchOps):
    """Our kernels and cuBLAS. `kernels` belong to one device and dtype; `grouped` multiplies the
    parts of several experts in one launch, where the device can."""

    name = "CUDA C, compiled at start"

    def __init__(
        self, kernels: Kernels, device: torch.device, grouped: GroupedProducts | None = None
    ) -> None:
        self.kernels, self.grouped = kernels, grouped

    def decode(self, packed: Packed, out: Tensor) -> None:
        packed.launch(self.kernels, out)

    def decode_alike(self, packed: Packed, out: Tensor, alike: Alike) -> bool:
        """Decode several weights in one launch; False where that cannot be, and nothing is done."""
        return packed.launch_alike(self.kernels, out, alike)

    def linear(
        self,
        x_NI: Tensor,
        weight_OI: Tensor,
        memory: Tensor | None = None,
        bias_O: Tensor | None = None,
    ) -> Tensor:
        weight_IO = weight_OI.t()
        if bias_O is None:
            return torch.mm(x_NI, weight_IO, out=memory)
        # cuBLAS adds a bias of one dimension in the product's end, where the sum is rounded once
        return torch.addmm(bias_O, x_NI, weight_IO, out=memory)

    def products(
        self,
        x_NI: Tensor,
        weights_POI: Tensor,
        biases_PO: Tensor | None,
        parts: Parts,
        memory_NO: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        if self.grouped is None or parts.ends is None:
            return super().products(x_NI, weights_POI, biases_PO, parts, memory_NO, rows)
        self.grouped(x_NI, rows, weights_POI, biases_PO, parts.spans, parts.ends, memory_NO)
        return memory_NO

    def add_linear_(self, residual_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> None:
        residual_NO.addmm_(x_NI, weight_OI.t())  # the sum is rounded once, in the product's end

    def logits(self, x_NH: Tensor, head_VH: Tensor, memory: Tensor | None = None) -> Tensor:
        if x_NH.dtype == torch.float32:
            return self.linear(x_NH, head_VH, memory)
        if memory is None:
            return torch.mm(x_NH, head_VH.t(), out_dtype=torch.float32)
        return torch.mm(x_NH, head_VH.t(), out_dtype=torch.float32, out=memory)

    def rms_norm(
        self,
        x: Tensor,
        weight_H: Tensor,
        eps: float,
        memory: Tensor,
        rows: Tensor | None = None,
        *,
        offset: float = 0.0,
    ) -> Tensor:
        self.kernels.rms_norm(x, weight_H, eps, memory, rows, offset)
        return memory

    def rope(
        self,
        x_BHTD: Tensor,
        cos_SR: Tensor,
        sin_SR: Tensor,
        first: int,
        out: Tensor,
        *,
        interleaved: bool = False,
        branched: tuple[int, int] | None = None,
    ) -> Tensor:
        self.kernels.rope(x_BHTD, out, cos_SR, sin_SR, first, interleaved, branched)
        return out

    def swiglu_(
        self,
        gate_up_N2I: Tensor,
        act: Activation = "silu",
        *,
        interleaved: bool = False,
        limit: float = 0.0,
    ) -> Tensor:
        return self.kernels.swiglu_(gate_up_N2I, act, interleaved, limit)

    def choose_experts(
        self,
        logits_NE: Tensor,
        router: Router,
        dtype: torch.dtype,
        bias_E: Tensor | None = None,
        correction_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        plain = router.score != "sigmoid" and not router.correction and router.groups == 1
        if not (plain and self.kernels.routes(logits_NE.shape[1], router.top_k)):
            return super().choose_experts(logits_NE, router, dtype, bias_E, correction_E)
        return self.kernels.choose_experts(
            logits_NE, router.top_k, over_chosen=router.score == "softmax_topk",
            normalize=router.normalize, scale=router.scale, rounds=dtype != torch.float32,
            bias=None if bias_E is None else bias_E.float(),
        )  # fmt: skip

    def sort_by_expert(self, experts_NK: Tensor, weights_NK: Tensor, num_experts: int) -> Routing:
        if not self.kernels.routes(num_experts, experts_NK.shape[1]):
            return super().sort_by_expert(experts_NK, weights_NK, num_experts)
        experts, weights = experts_NK.int().contiguous(), weights_NK.float().contiguous()
        return Routing(*self.kernels.sort_by_expert(experts, weights, num_experts))

    def add_rows_(self, update: Tensor, rows: Tensor, y_NH: Tensor, weight_N: Tensor) -> None:
        self.kernels.add_rows_(update, rows, y_NH, weight_N)

    def add_places_(
        self, update: Tensor, places_NK: Tensor, first: int, y: Tensor, weight: Tensor
    ) -> None:
        self.kernels.add_places_(update, places_NK, first, y, weight)

    def leave_layer_(
        self, hidden: Tensor, update: Tensor, unit_N: Tensor, first_bad: Tensor, layer: int
    ) -> None:
        self.kernels.leave_layer_(hidden, update, unit_N, first_bad, layer)

    def losses(self, logits_TV: Tensor, target_T: Tensor) -> Tensor:
        return self.score_branches([logits_TV], target_T)[0, :, 0]

    def score_branches(self, logits: list[Tensor], target: Tensor) -> Tensor:
        scores = torch.empty(len(logits), len(target), 3, device=target.device)
        self.kernels.score(logits, target, scores)
        return scores
