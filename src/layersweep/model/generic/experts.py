"""One expert at a time: transformers' own gate and activation around two products.

A module with many experts keeps their matrices as one [E, ...] parameter each. Only one expert's
part is ever dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layersweep.model.generic.walk import AtExperts

Linear = Callable[[Tensor, Tensor], Tensor]  # x [N, in], weight [out, in] -> [N, out]


def expert_rows(
    module: nn.Module, one: Mapping[str, Tensor], x_NH: Tensor, linear: Linear = F.linear
) -> Tensor:
    """What an expert makes of rows. `one`: its parts of the module's parameters, by their names.

    The layout flags are those of transformers.integrations.moe.use_experts_implementation.
    """
    of: Any = module
    name = "gate_up_proj" if of.has_gate else "up_proj"
    inner = _product(x_NH, one, name, of, linear)
    inner = of._apply_gate(inner) if of.has_gate else of.act_fn(inner)
    found = _product(inner, one, "down_proj", of, linear)
    return of.post_expert_norm(found) if of.has_post_expert_norm else found


def _product(x: Tensor, one: Mapping[str, Tensor], name: str, of: Any, linear: Linear) -> Tensor:
    weight = one[name]
    found = linear(x, weight.T if of.is_transposed else weight)
    return found + one[f"{name}_bias"] if of.has_bias else found


@dataclass
class ExpertSums:
    """Rows of a tile sorted by expert, and their weighted sums so far.

    An expert's rows are unique, and experts come in order, so a row's sum depends on nothing else.
    """

    rows_NH: Tensor
    sums_NH: Tensor
    order: Tensor
    weights: Tensor
    start: list[int]

    @classmethod
    def of(cls, halt: AtExperts, experts: int) -> ExpertSums:
        """Sort by expert, then by token. Waits for the device."""
        chosen, order = halt.experts_NK.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(experts, device=chosen.device), right=True)
        weights = halt.weights_NK.flatten()[order]
        per_row = halt.experts_NK.shape[1]
        sums = torch.zeros_like(halt.rows_NH)
        return cls(halt.rows_NH, sums, order // per_row, weights, [0, *ends.tolist()])

    def add(
        self, expert: int, module: nn.Module, one: Mapping[str, Tensor], linear: Linear = F.linear
    ) -> None:
        """This expert's rows through it, weighted, onto the sums."""
        some = slice(self.start[expert], self.start[expert + 1])
        rows = self.order[some]
        if len(rows):
            found = expert_rows(module, one, self.rows_NH[rows], linear)
            weighted = found * self.weights[some, None]
            self.sums_NH.index_add_(0, rows, weighted.to(self.sums_NH.dtype))
