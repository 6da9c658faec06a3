"""One expert at a time: transformers' own gate and activation around two products.

A module with many experts keeps their matrices as one [E, ...] parameter each. Only one expert's
part is ever dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layersweep.model.generic.walk import AtExperts
from layersweep.model.maths import linear
from layersweep.model.ops import TorchOps


def expert_rows(module: nn.Module, one: Mapping[str, Tensor], x_NH: Tensor) -> Tensor:
    """What an expert makes of rows. `one`: its parts of the module's parameters, by their names.

    The layout flags are those of transformers.integrations.moe.use_experts_implementation.
    """
    of: Any = module
    inner = _product(x_NH, one, "gate_up_proj" if of.has_gate else "up_proj", of)
    inner = of._apply_gate(inner) if of.has_gate else of.act_fn(inner)
    found = _product(inner, one, "down_proj", of)
    return of.post_expert_norm(found) if of.has_post_expert_norm else found


def _product(x: Tensor, one: Mapping[str, Tensor], name: str, of: Any) -> Tensor:
    weight = one[name]
    found = linear(x, weight.T if of.is_transposed else weight)
    return found + one[f"{name}_bias"] if of.has_bias else found


@dataclass
class ExpertSums:
    """Rows of a tile sorted by expert, and their weighted sums so far.

    An expert's rows are unique, and experts come in order, so a row's sum depends on nothing else.
    `start[e]` to `start[e + 1]` of `order` are expert e's; `ends` the same on the device, until
    `settle` has brought them to the host. `at_once`: rows of one product.
    """

    rows_NH: Tensor
    sums_NH: Tensor
    order: Tensor
    weights: Tensor
    ends: Tensor
    at_once: int
    start: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, halt: AtExperts, experts: int, at_once: int) -> ExpertSums:
        """Sort by expert, then by token. No synchronization."""
        chosen, order = halt.experts_NK.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(experts, device=chosen.device), right=True)
        weights = halt.weights_NK.flatten()[order]
        sums = torch.zeros_like(halt.rows_NH)
        return cls(halt.rows_NH, sums, order // halt.experts_NK.shape[1], weights, ends, at_once)

    @staticmethod
    def settle(tiles: Sequence[ExpertSums]) -> None:
        """Bring the counts of all tiles to the host: one small copy per layer."""
        ends = torch.stack([tile.ends for tile in tiles]).tolist()
        for tile, own in zip(tiles, ends, strict=True):
            tile.start = [0, *own]

    def add(self, expert: int, module: nn.Module, one: Mapping[str, Tensor], ops: TorchOps) -> None:
        """This expert's rows through it, weighted, onto the sums."""
        last = self.start[expert + 1]
        for first in range(self.start[expert], last, self.at_once):
            some = slice(first, min(first + self.at_once, last))
            rows = self.order[some]
            found = expert_rows(module, one, self.rows_NH[rows])
            ops.add_rows_(self.sums_NH, rows, found, self.weights[some])

    def health(self) -> tuple[int, float]:
        """How many experts have rows, and how much the weights of rows differ. Waits."""
        used = sum(last > first for first, last in zip(self.start, self.start[1:], strict=False))
        experts = torch.arange(len(self.start) - 1, device=self.order.device)
        counts = torch.tensor(self.start, device=self.order.device).diff()
        table = self.weights.new_zeros(len(self.rows_NH), len(experts))
        table[self.order, experts.repeat_interleave(counts)] = self.weights
        return used, float(table.float().std(0).max())
