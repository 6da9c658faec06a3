"""What sweeps of one model share: where its weights come from, and memory to compute in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from layersweep.families.spec import Decoder
from layersweep.model.compute import Compute, Scratch
from layersweep.stream.experts import ExpertStore
from layersweep.stream.store import BlockStore
from layersweep.sweep.context import RopeTables
from layersweep.sweep.dense import DenseWeights
from layersweep.sweep.visits import LayerBlocks, visits_of

TABLE_STEP = 1024  # tokens; steps look at columns that are aligned


class Engine:
    """What sweeps of one model share: where blocks come from, and memory to compute in.

    `layers`: those that this engine holds, all by default; the first one's has the embedding, too,
    and the last one's the head. `reference`: tokens of the text that arms with @fit=1 take
    their coordinates from; without it, these follow from the weights. `keeps_normed`: tiles keep
    the rows that a layer's experts see, from which their products gather. `keeps_dense`: weights
    are decoded in the first walk, and stay so. `experts`: where routed experts are; by default they
    are in `store`, like everything else.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: BlockStore,
        compute: Compute,
        scratch_bytes: int,
        layers: range | None = None,
        reference: tuple[int, ...] = (),
        keeps_normed: bool = False,
        keeps_dense: bool = False,
        experts: ExpertStore | None = None,
    ) -> None:
        self.decoder, self.store, self.compute = decoder, store, compute
        self.reference, self.keeps_normed = reference, keeps_normed
        self.experts = experts
        self.layers = layers or range(decoder.num_hidden_layers)
        self._visiting = threading.Lock()
        self._tables: RopeTables | None = None
        self.weights = DenseWeights(decoder, compute, keeps=keeps_dense)
        self.scratch = Scratch(scratch_bytes, compute.device)

    @contextmanager
    def visited(self) -> Iterator[None]:
        """One walk over this engine's blocks; other sweeps wait until it is left."""
        with self._visiting:
            if not self.compute.cpu:
                torch.cuda.set_device(self.compute.device)
            with self.store.sweep():
                if self.experts is None:
                    yield
                    return
                self.experts.begin()
                try:
                    yield
                finally:
                    self.experts.end()

    @cached_property
    def blocks(self) -> dict[int, LayerBlocks]:
        """What is visited, by layer."""
        fetched = self.experts.specs if self.experts else []
        return visits_of(self.decoder, self.store.specs, fetched, self.compute)

    def tables(self, longest: int) -> RopeTables:
        """For texts that grow to `longest` tokens: made anew every TABLE_STEP tokens, not in every
        walk."""
        if self._tables is None or self._tables.longest < longest:
            self._tables = RopeTables(-(-longest // TABLE_STEP) * TABLE_STEP, self.compute)
        self._tables.forget_lengths()
        return self._tables

    @property
    def bytes_read(self) -> int:
        """From files so far."""
        return self.store.bytes_read + (self.experts.bytes_read if self.experts else 0)

    @property
    def h2d_bytes(self) -> int:
        """Copied to the device so far; 0 on the CPU."""
        return self.store.h2d_bytes + (self.experts.h2d_bytes if self.experts else 0)

    @property
    def stall_s(self) -> float:
        """Seconds that computation waited for weights."""
        return self.store.stall_s + (self.experts.stall_s if self.experts else 0.0)

    def close(self) -> None:
        self.store.close()
        if self.experts is not None:
            self.experts.close()
