"""A tile on its way through transformers' layers, and what it waits for at a set of experts."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from layersweep.families.spec import Decoder
from layersweep.model.compute import Compute, Scratch
from layersweep.model.generic.decoder import Modules
from layersweep.model.generic.turning import Turners
from layersweep.model.generic.walk import AtExperts, AtLayer, Done, Halt
from layersweep.model.ops import NEVER
from layersweep.model.routing import sort_by_expert
from layersweep.sweep.generic_rows import TileRows, context_maker, tile_positions
from layersweep.sweep.sequences import Tile
from layersweep.sweep.state import TileState


class Walking:
    """`halt` is where the tile's forward pass stands. At experts, its `state` has the rows that go
    there, their routing and the sums of what comes of them."""

    def __init__(
        self,
        decoder: Decoder,
        modules: Modules,
        compute: Compute,
        scratch: Scratch,
        tile: Tile,
        bits: dict[tuple[str, str], list[float]],
        turners: Turners,
        leave: ExitStack,
    ) -> None:
        device = compute.device
        self.tile, self.state = tile, TileState(tile, decoder.query_width)
        self.state.unit_of_row = self.state.unit_of_row.to(device)
        self.state.first_bad_layer = self.state.first_bad_layer.to(device)
        self.decoder, self.compute = decoder, compute
        longest = max(sequence.longest for sequence in tile.sequences)
        context = context_maker(decoder, compute, scratch, bits, turners, longest)
        rows = TileRows(tile, self.state.groups, modules.layer_of, context, cpu=compute.cpu)
        ids = torch.from_numpy(tile.ids()).to(device)
        self._walk = modules.walk(ids, tile_positions(tile).to(device), rows)
        leave.callback(self._walk.close)
        self.halt: Halt | None = None

    @property
    def hidden(self) -> Tensor:
        """Of its rows [N, H], between two layers or behind the base model."""
        assert isinstance(self.halt, AtLayer | Done)
        return self.halt.hidden_NH

    def go(self) -> None:
        """On to the next halt, with the experts' sums if it waited for them."""
        state = self.state
        sums, state.routing = state.update, None
        state.hidden = state.update = torch.empty(0)
        self.halt = None  # what it holds is the model's alone, while that computes
        self.halt = self._walk.go(sums)

    def route(self, layer: int) -> None:
        """Sort its rows by expert. No synchronization."""
        halt, state = self.halt, self.state
        assert isinstance(halt, AtExperts)
        experts = self.decoder.layers[layer].feed.experts
        # by torch: the kernel would trust a foreign router with its memory
        state.routing = sort_by_expert(halt.experts_NK, halt.weights_NK, experts)
        state.hidden = halt.rows_NH.contiguous()  # as products gather from them
        state.update = torch.zeros_like(state.hidden)

    def spread(self) -> Tensor:
        """How much the rows' weights of the experts differ, the most of any expert. No wait."""
        assert isinstance(self.halt, AtExperts) and self.state.routing is not None
        experts = len(self.state.routing.start) - 1
        table = self.state.routing.weights.new_zeros(self.tile.rows, experts)
        table.scatter_(1, self.halt.experts_NK, self.halt.weights_NK.to(table.dtype))
        return table.float().std(0).max()

    def note_bad(self, layer: int) -> None:
        """Which prefixes and branches are no longer finite. No wait."""
        bad = ~torch.isfinite(self.hidden.sum(-1, dtype=torch.float32))
        found = torch.where(bad, layer, NEVER).to(torch.int32)
        state = self.state
        state.first_bad_layer.scatter_reduce_(0, state.unit_of_row.long(), found, "amin")
