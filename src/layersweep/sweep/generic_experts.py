"""Experts of transformers' modules, whose weights are dense, with each tile in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from layersweep.families.generic.alike import GateAct
from layersweep.families.generic.wanted import split_key
from layersweep.families.spec import Layer
from layersweep.families.weights import BlockShape
from layersweep.model.compute import Compute, Scratch
from layersweep.model.generic.experts import expert_rows
from layersweep.model.ops import Parts
from layersweep.sweep.dense import DenseWeights, Views
from layersweep.sweep.feed import FeedVisit
from layersweep.sweep.state import TileState


class ExpertsVisit(FeedVisit):
    """A few experts; rows come normed, and `module` computes between their products, but for a gate
    that is no more than `act` of one half times the other."""

    def __init__(
        self, blocks: Sequence[BlockShape], layer: Layer, weights: DenseWeights, compute: Compute,
        scratch: Scratch, module: nn.Module, act: GateAct | None,
    ) -> None:  # fmt: skip
        super().__init__(blocks, layer, weights, compute, scratch)
        self.feeds = joined(weights.feeds, dim=1)
        self.module, self.act = module, act

    def _experts(self, state: TileState, rows: Tensor, weights: Views, parts: Parts) -> Tensor:
        take = partial(self.scratch.take, dtype=self.compute.dtype)
        ops = self.compute.ops
        return expert_rows(self.module, self.act, weights, state.hidden, rows, parts, ops, take)


def joined(views: Views, dim: int = 0) -> dict[str, Tensor]:
    """Weights by the names of their parameters: those in pieces as one, along `dim`."""
    pieces: dict[str, list[Tensor]] = {}
    for key, view in views.items():
        pieces.setdefault(split_key(key)[1], []).append(view)
    return {
        key: parts[0] if len(parts) == 1 else _side_by_side(parts, dim)
        for key, parts in pieces.items()
    }


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor:
    """Views that follow one another in memory as one view; else a copy."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end:
            return torch.cat(parts, dim)
        end += part.shape[dim] * part.stride(dim) * part.itemsize
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride())
