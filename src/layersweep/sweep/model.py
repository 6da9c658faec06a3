"""A model ready to be swept: headers read, budgets fixed, weights still in their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from layersweep.checkpoint.layout import Checkpoint, open_checkpoint
from layersweep.environment import Budget, context_bytes, ram_budget, vram_budget
from layersweep.errors import Fallback, InputError
from layersweep.families.spec import Decoder, describe_decoder
from layersweep.kv.arms import EXACT
from layersweep.model.compute import Compute, choose_compute
from layersweep.model.generic.memory import let_segments_grow
from layersweep.model.ops import CudaOps
from layersweep.model.refusal import check_attention
from layersweep.stream.blocks import BlockSpec, block_specs, blocks_of, split_experts
from layersweep.stream.experts import ExpertStore
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.shapes import Machine, TileShape, most_experts_at_once, tile_flops
from layersweep.stream.store import BlockStore
from layersweep.sweep.choices import one_of, resolve_capability, resolve_device, resolve_dtype
from layersweep.sweep.engine import Engine
from layersweep.sweep.generic_limits import float_fallbacks, module_fallbacks
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.record import LogitsReader, Pieces, Progress, SweepRecord
from layersweep.sweep.sequences import (
    Branch,
    BranchedSequence,
    Tile,
    reference_tile,
    tiles_of,
)
from layersweep.sweep.shapes import check_length, tile_shape
from layersweep.sweep.watch import Watch
from layersweep.units import format_bytes

SCORE_TILE = 20


@dataclass(frozen=True)
class Paths:
    """The implementation chosen for each job, once, at the start; printed and recorded."""

    model: str
    dequant: str
    experts: str
    attention: str
    kernels: str


@dataclass(frozen=True)
class Model:
    """A checkpoint, how to compute it, and the memory it may take. Holds no weights.

    `context_bytes`: device memory that CUDA itself holds, part of the `vram` budget. `sharers`:
    processes on this host that read the same files, `ram` is the share of one. `beside`: the same
    on further devices, for generation. `reference`: see Engine. `say`: who is told of a fallback
    while it is used.
    """

    checkpoint: Checkpoint
    specs: list[BlockSpec]
    compute: Compute
    vram: Budget
    ram: Budget
    weights: str
    router_dtype: str
    context_bytes: int = 0
    sharers: int = 1
    beside: tuple[Model, ...] = ()
    reference: tuple[int, ...] = ()
    say: Callable[[Fallback], None] = field(default=lambda fallback: None, compare=False)

    def __repr__(self) -> str:
        """What it is, how it is computed, and what it may take: a line each."""
        dtype = str(self.compute.dtype).removeprefix("torch.")
        decoder = self.checkpoint.decoder
        return "\n".join(
            [
                f"{self.checkpoint.source}: {describe_decoder(decoder)}, "
                f"{self.checkpoint.weights_kind}, {format_bytes(self.checkpoint.nbytes)}",
                f"device {self.compute.device}, {dtype}; kernels: {self.paths.kernels}; "
                f"attention: {self.paths.attention}",
                f"vram {format_bytes(self.vram.bytes)} ({self.vram.source}), "
                f"ram {format_bytes(self.ram.bytes)} ({self.ram.source})",
            ]
        )

    @property
    def cpu(self) -> bool:
        return self.compute.cpu

    @property
    def decoder(self) -> Decoder:
        return self.checkpoint.decoder

    @property
    def paths(self) -> Paths:
        kernels = self.compute.ops.name
        return Paths(
            model="generic" if self.decoder.generic else "own",
            dequant="torch table lookup" if kernels == "torch" else kernels,
            experts=self._experts_path(),
            attention=self.compute.attention.name,
            kernels=kernels,
        )

    def _experts_path(self) -> str:
        if not self.decoder.num_experts:
            return "none"
        at_once = most_experts_at_once(self.decoder, self.compute.dtype.itemsize, cpu=self.cpu)
        if at_once == 1:
            return "one dense expert at a time, all tiles"
        if self.compute.ops.grouped:
            return f"grouped products in Triton, {at_once} at once"
        return f"{at_once} dense experts at a time, a product each, all tiles"

    @property
    def machine(self) -> Machine:
        """Budgets and habits of the device, for the planner."""
        return Machine(
            vram=self.vram.bytes,
            ram=self.ram.bytes,
            element=self.compute.dtype.itemsize,
            cpu=self.cpu,
            context=self.context_bytes,
            repeats_kv=self.compute.attention.repeats_kv,
            kernels=isinstance(self.compute.ops, CudaOps),
            grouped=self.compute.ops.grouped is not None,
            sharers=self.sharers,
        )

    def shape(self, tile: Tile) -> TileShape:
        """What a plan must know of a tile."""
        return tile_shape(tile, self.decoder.query_width)

    def plan(self, tiles: Sequence[Tile], at_least: int = 1) -> Plan:
        """Where `tiles` and weights go, in `at_least` sweeps if there are so many tiles. Raises
        BudgetError for what cannot fit."""
        shapes = [self.shape(tile) for tile in tiles]
        return make_plan(
            self.decoder, self.specs, shapes, self.machine, at_least, reference=self.reference_shape
        )

    @property
    def reference_shape(self) -> TileShape | None:
        """Of the tile that rides ahead of every sweep."""
        return self.shape(reference_tile(self.reference)) if self.reference else None

    def flops(self, tile: Tile) -> float:
        """Operations of a tile in one sweep."""
        return tile_flops(self.checkpoint.decoder, self.shape(tile))

    def open(
        self,
        plan: Plan,
        say: Callable[[Fallback], None] = lambda fallback: None,
        layers: range | None = None,
        *,
        keeps_dense: bool = False,
        slots: int = 0,
        home_bytes: int = 0,
    ) -> Engine:
        """Take the memory of a plan; of the plan of some `layers`, where they are given. With
        `slots`, the plan is of all but routed experts, which have that many places and
        `home_bytes` of host memory (stream/experts.py).

        Fallbacks are told to `say` as they happen.
        """
        layers = layers or range(self.checkpoint.decoder.num_hidden_layers)
        if not self.cpu:  # memory that is free in torch's cache must not count towards the peak
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.compute.device)
        specs = blocks_of(self.specs, layers)
        experts = None
        if slots:
            specs, routed = split_experts(specs)
            experts = ExpertStore(
                routed, slots, self.compute.device, decode=self.compute.ops.decode,
                home_bytes=home_bytes, say=say,
            )  # fmt: skip
        store = BlockStore(
            specs,
            plan.placement,
            self.compute.device,
            decode=self.compute.ops.decode,
            say=say,
        )
        with ExitStack() as undo:
            undo.callback(store.close)
            decoder = self.checkpoint.decoder
            if decoder.generic:
                from layersweep.sweep.generic import GenericEngine

                engine: Engine = GenericEngine(decoder, store, self.compute, plan.scratch)
            else:
                engine = Engine(
                    decoder, store, self.compute, plan.scratch, layers, self.reference,
                    plan.keeps_normed, keeps_dense, experts,
                )  # fmt: skip
            undo.pop_all()
        return engine

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probability of every token but the first, float32 [len - 1] per sequence.

        One sweep over the weights for any number of sequences that fit the budget. Raises
        InputError for a sequence shorter than 2 tokens or longer than the model's limit, and for
        an id beyond the vocabulary.
        """
        decoder = self.checkpoint.decoder
        for index, ids in enumerate(sequences):
            if len(ids) < 2 or not all(0 <= token < decoder.vocab_size for token in ids):
                raise InputError(
                    f"sequence {index}: found {len(ids)} ids up to {max(ids, default=0)}, needed "
                    f"2 or more ids from 0 to {decoder.vocab_size - 1}",
                    hint="tokenize with this model's own tokenizer",
                )
        longest = max((len(ids) for ids in sequences), default=0)
        check_length(decoder, longest, "cut it into pieces")
        rides = [
            BranchedSequence((), (Branch(EXACT, tuple(ids), (0, len(ids) - 1)),))
            for ids in sequences
        ]
        tiles = tiles_of("score", rides, SCORE_TILE)
        scores: list[Tensor] = [torch.empty(0)] * len(rides)

        def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
            compute = self.compute
            target = torch.tensor(sequence.branches[0].ids[1:], device=compute.device)
            losses = [compute.ops.losses(logits, target[at]) for at, (logits,) in pieces]
            scores[tile.first + number] = -torch.cat(losses).cpu()

        self.run(tiles, read)
        return scores

    def run(
        self, tiles: list[Tile], read: LogitsReader, *, watch: Watch | None = None,
        progress: Progress = lambda phase, done, total: None,
    ) -> SweepRecord:  # fmt: skip
        """Sweep `tiles` in as many sweeps as the budget needs; what all of them leave."""
        plan, record = self.plan(tiles), SweepRecord()
        engine = self.open(plan, self.say)
        try:
            for sweep in plan.sweeps:
                some = [tiles[index] for index in sweep]
                done = run_sweep(engine, some, read, progress=progress, watch=watch)
                record.add(done, ahead=sweep[0])
            record.sweeps, record.bytes_read = len(plan.sweeps), engine.store.bytes_read
        finally:
            engine.close()
        return record


def load(
    source: str = "demo",
    *,
    revision: str | None = None,
    vram: str = "auto",
    ram: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "auto",
    router_dtype: str = "float32",
    assume_capability: str | None = None,
    sharers: int = 1,
    program: str = "auto",
) -> Model:
    """Open a checkpoint: headers, decoder and budgets; no weights are read.

    `source`: a folder, a hub id, or "demo". Sizes as "14GiB". `device` "cuda:0,cuda:1": see
    `beside`. `assume_capability` ("7.5") takes the paths of an older GPU than the one at hand.
    `sharers`: processes on this host that do the same on other devices; each takes its part of
    `ram`. `program` "generic": transformers' own layers compute a folder's model, though this
    package has a program for its family. Raises CheckpointError, InputError or BudgetError, each
    with what was found and what was needed.
    """
    if "," in device:
        first, *others = [
            load(
                source, revision=revision, vram=vram, ram=ram, device=one, dtype=dtype,
                weights=weights, router_dtype=router_dtype, assume_capability=assume_capability,
                sharers=sharers, program=program,
            )
            for one in device.split(",")
        ]  # fmt: skip
        return replace(first, beside=tuple(others))
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    assumed = resolve_capability(assume_capability, place)
    one_of("--weights", weights, ("auto", "native", "nf4"))
    one_of("--router-dtype", router_dtype, ("float32", "hidden"))
    host = ram_budget(ram).share(sharers)
    budget = vram_budget(vram, place, host=host)
    one_of("program", program, ("auto", "generic"))
    checkpoint = open_checkpoint(source, revision, generic=program == "generic")
    compute = choose_compute(
        torch.device(place), kind, router_float=router_dtype == "float32",
        assume_capability=assumed,
        groups=most_experts_at_once(checkpoint.decoder, kind.itemsize, cpu=place == "cpu") > 1,
    )  # fmt: skip
    check_attention(checkpoint.decoder, compute.attention)
    specs = block_specs(checkpoint, quantize=weights == "nf4")
    if checkpoint.decoder.generic:
        left = float_fallbacks(specs) if weights == "nf4" else ()
        fixed = let_segments_grow(compute.device)
        also = (
            *compute.fallbacks, *([fixed] if fixed else []),
            *module_fallbacks(checkpoint.decoder, kind.itemsize), *left,
        )  # fmt: skip
        compute = replace(compute, fallbacks=also)
    return Model(
        checkpoint=checkpoint,
        specs=specs,
        compute=compute,
        # free memory, which "auto" takes, is what the context has left
        context_bytes=0 if place == "cpu" or vram == "auto" else context_bytes(place),
        vram=budget,
        ram=host,
        weights=weights,
        router_dtype=router_dtype,
        sharers=sharers,
    )
