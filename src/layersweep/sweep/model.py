"""A model ready to be swept: headers read, budgets fixed, weights still in their files."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.checkpoint.layout import Checkpoint, open_checkpoint
from layersweep.environment import Budget, ram_budget, vram_budget
from layersweep.errors import InputError
from layersweep.kv.arms import EXACT
from layersweep.stream.blocks import BlockSpec, block_specs
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.store import BlockStore
from layersweep.sweep.loop import LogitsReader, Numerics, run_sweep
from layersweep.sweep.sequences import Branch, Sequence, Tile, tiles_of
from layersweep.sweep.shapes import tile_shape

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SCORE_TILE = 20


@dataclass(frozen=True)
class Paths:
    """The implementation chosen for each job, once, at the start; printed and recorded."""

    dequant: str
    experts: str
    attention: str


@dataclass(frozen=True)
class Model:
    """A checkpoint, how to compute it, and the memory it may take. Holds no weights."""

    checkpoint: Checkpoint
    specs: list[BlockSpec]
    numerics: Numerics
    vram: Budget
    ram: Budget
    weights: str
    router_dtype: str
    paths: Paths = field(
        default=Paths(
            dequant="torch table lookup",
            experts="loop over experts, one dense at a time",
            attention="torch scaled_dot_product_attention",
        )
    )

    @property
    def cpu(self) -> bool:
        return self.numerics.device.type == "cpu"

    def plan(self, tiles: Many[Tile]) -> Plan:
        """Where `tiles` and weights go. Raises BudgetError for what cannot fit."""
        config = self.checkpoint.config
        width = config.num_attention_heads * config.head_dim
        return make_plan(
            config,
            self.specs,
            [tile_shape(tile, width) for tile in tiles],
            element=self.numerics.dtype.itemsize,
            vram=self.vram.bytes,
            ram=self.ram.bytes,
            cpu=self.cpu,
        )

    def open_store(self, plan: Plan) -> BlockStore:
        return BlockStore(
            self.specs,
            resident_bytes=plan.resident_bytes,
            ring_bytes=plan.ring_bytes,
            device=self.numerics.device,
        )

    def score(self, sequences: Many[Many[int]]) -> list[Tensor]:
        """Log-probability of every token but the first, float32 [len - 1] per sequence.

        One sweep over the weights for any number of sequences that fit the budget. Raises
        InputError for a sequence shorter than 2 tokens or with an id beyond the vocabulary.
        """
        config = self.checkpoint.config
        for index, ids in enumerate(sequences):
            if len(ids) < 2 or not all(0 <= token < config.vocab_size for token in ids):
                raise InputError(
                    f"sequence {index}: found {len(ids)} ids up to {max(ids, default=0)}, needed "
                    f"2 or more ids from 0 to {config.vocab_size - 1}",
                    hint="tokenize with this model's own tokenizer",
                )
        rides = [Sequence((), (Branch(EXACT, tuple(ids), (0, len(ids) - 1)),)) for ids in sequences]
        tiles = tiles_of("score", rides, SCORE_TILE)
        scores: list[Tensor] = [torch.empty(0)] * len(rides)

        def read(tile: Tile, number: int, sequence: Sequence, logits: list[Tensor]) -> None:
            target = torch.tensor(sequence.branches[0].ids[1:], device=logits[0].device)
            chosen = logits[0].log_softmax(-1).gather(1, target[:, None])[:, 0]
            scores[tile.first + number] = chosen.cpu()

        self.run(tiles, read)
        return scores

    def run(self, tiles: list[Tile], read: LogitsReader) -> None:
        """Sweep `tiles` in as many sweeps as the budget needs."""
        plan = self.plan(tiles)
        store = self.open_store(plan)
        try:
            for sweep in plan.sweeps:
                some = [tiles[index] for index in sweep]
                run_sweep(self.checkpoint.config, store, self.numerics, some, read)
        finally:
            store.close()


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
) -> Model:
    """Open a checkpoint: headers, config and budgets; no weights are read.

    `source`: a folder, a hub id, or "demo". Sizes as "14GiB". Raises CheckpointError,
    InputError or BudgetError, each with what was found and what was needed.
    """
    place = resolve_device(device)
    compute = resolve_dtype(dtype, place)
    _one_of("--weights", weights, ("auto", "native", "nf4"))
    _one_of("--router-dtype", router_dtype, ("float32", "hidden"))
    host = ram_budget(ram)
    budget = vram_budget(vram, place, host=host)
    checkpoint = open_checkpoint(source, revision)
    return Model(
        checkpoint=checkpoint,
        specs=block_specs(checkpoint, quantize=weights == "nf4"),
        numerics=Numerics(torch.device(place), compute, router_dtype == "float32"),
        vram=budget,
        ram=host,
        weights=weights,
        router_dtype=router_dtype,
    )


def resolve_device(device: str) -> str:
    """ "cuda:0" or "cpu" for a --device argument; raises InputError for what is not there."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if available else "cpu"
    if device == "cpu":
        return device
    if "," in device:
        raise InputError(
            f"--device {device}: found several devices, this version computes on one",
            hint="--device cuda:0",
        )
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise InputError(
            f"--device: found '{device}', needed auto, cpu, cuda or cuda:N",
            hint="--device auto takes a GPU if there is one",
        )
    if int(index or 0) >= available:
        raise InputError(
            f"--device {device}: found {available} CUDA devices, needed number {index or 0}",
            hint="--device cpu, or see `layersweep doctor`",
        )
    return f"cuda:{int(index or 0)}"


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """float16 on a GPU and float32 on the CPU, unless a GPU is told otherwise."""
    _one_of("--dtype", dtype, ("auto", *DTYPES))
    if device == "cpu":
        if dtype not in ("auto", "float32"):
            raise InputError(
                f"--dtype {dtype}: found device cpu, which computes in float32 alone",
                hint="--dtype float32 (or auto)",
            )
        return torch.float32
    return DTYPES["float16" if dtype == "auto" else dtype]


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            f"{option}: found '{value}', needed one of {', '.join(allowed)}",
            hint=f"{option} {allowed[0]}",
        )
