"""A study up to its first figure: text, windows and needles as they will be, and the gate's tokens
through the first layers. What needs a whole model, the gate's losses, cannot be checked so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from layersweep.errors import GateError, InputError
from layersweep.families.spec import Decoder
from layersweep.stream.blocks import block_specs
from layersweep.study.gate import Check
from layersweep.study.study import Study, prepare_study
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model
from layersweep.sweep.record import Pieces
from layersweep.sweep.sequences import BranchedSequence, Tile
from layersweep.tasks.settings import EvalSettings

LATE = 8  # layers, which a CPU reads and computes in a minute


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal saw. `items`: by task; `tokens`: of all of them, arms counted once."""

    study: Study
    layers: int
    of_layers: int
    items: dict[str, int]
    tokens: int
    checks: list[Check]
    weight_bytes_read: int


def rehearse(model: Model, settings: EvalSettings, layers: int) -> Rehearsal:
    """Prepare the study and send the gate's tile through embedding, `layers` layers and head; more
    of them where kinds of layers come first that those are not.

    Raises InputError for all that `prepare_study` refuses, and GateError for a layer whose hidden
    states are not finite or whose router is dead.
    """
    whole = model.checkpoint.decoder.num_hidden_layers
    if not 1 <= layers <= whole:
        raise InputError(
            f"--rehearse: found {layers}, needed 1 to {whole} layers", hint="--rehearse 2"
        )
    layers = max(layers, reaching_every_kind(model.checkpoint.decoder))
    study = prepare_study(first_layers(model, layers), settings, of_layers=whole)
    if study.gate is None:
        raise InputError(
            "--rehearse: found --gate off, needed the gate: it is what is rehearsed",
            hint="leave --gate out",
        )
    tile = study.gate.tile()
    engine = study.model.open(study.model.plan([tile]))
    try:
        run_sweep(engine, [], _check_finite, lead=tile, check=study.gate.check_layer)
        read = engine.store.bytes_read
    finally:
        engine.close()
    return Rehearsal(
        study, layers, whole,
        items={
            task.name: sum(len(tile.sequences) for tile in study.tiles if tile.name == task.name)
            for task in study.tasks
        },
        tokens=sum(_tokens(sequence) for tile in study.tiles for sequence in tile.sequences),
        checks=study.gate.checks,
        weight_bytes_read=read,
    )  # fmt: skip


def reaching_every_kind(decoder: Decoder) -> int:
    """How many of the first layers have one of each kind among them: windows and full attention,
    dense layers and experts. A kind that comes late is not waited for."""
    firsts = (decoder.layers.index(kind) for kind in decoder.distinct_layers)
    return 1 + max(first for first in firsts if first < LATE)


def first_layers(model: Model, layers: int) -> Model:
    """The model as if it ended after its first layers: real weights, no sensible logits."""
    checkpoint = model.checkpoint
    decoder = replace(checkpoint.decoder, layers=checkpoint.decoder.layers[:layers])
    shallow = replace(checkpoint, decoder=decoder)
    specs = block_specs(shallow, quantize=model.weights == "nf4")
    return replace(model, checkpoint=shallow, specs=specs)


def _check_finite(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
    if not all(torch.isfinite(logits).all() for _, (logits,) in pieces):
        raise GateError(
            "rehearsal: the head's logits are not finite, needed finite ones",
            hint="the last norm or the head is damaged: see `layersweep inspect`",
        )


def _tokens(sequence: BranchedSequence) -> int:
    return len(sequence.prefix) + max(len(branch.ids) for branch in sequence.branches)
