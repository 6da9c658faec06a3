"""The same numbers through layersweep: branches of a sweep, no text and no tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from stepped import stepped
from torch import Tensor

from families.probe import (
    NEEDLE_ANSWER,
    NEEDLE_BRANCH,
    NEEDLE_PREFIX,
    PREFIX,
    QUESTION,
    STEPS,
    Losses,
    needle_ids,
    window_ids,
)
from layersweep.kv.arms import EXACT, Arm
from layersweep.sweep.caches import KeptCaches
from layersweep.sweep.model import Model, load
from layersweep.sweep.record import Pieces, joined
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile


def opened(
    folder: Path,
    weights: str = "auto",
    *,
    device: str = "cpu",
    dtype: str = "auto",
    capability: str | None = None,
) -> Model:
    return load(
        str(folder), vram="1GiB", ram="1GiB", weights=weights, device=device, dtype=dtype,
        assume_capability=capability,
    )  # fmt: skip


def losses(model: Model, arm: Arm = EXACT, *, streaming: bool = False) -> Losses:
    """Of the continuation and of the answer, read through `arm`."""
    vocab = model.decoder.vocab_size
    windows, needle = window_ids(vocab).tolist(), needle_ids(vocab).tolist()
    found = token_losses(
        model,
        [
            *(_ride(ids, PREFIX, len(ids) - PREFIX - 1, arm, streaming) for ids in windows),
            _ride(needle, NEEDLE_PREFIX, NEEDLE_ANSWER, arm, streaming),
        ],
    )
    assert len(needle) == NEEDLE_PREFIX + NEEDLE_BRANCH
    return Losses(torch.stack(found[:-1]), found[-1])


def token_losses(model: Model, rides: list[BranchedSequence]) -> list[Tensor]:
    """Of the tokens that each ride's last branch reads; the other branches are computed too."""
    found: list[Tensor] = []

    def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        branch = sequence.branches[-1]
        start, stop = branch.read
        target = torch.tensor(branch.ids[start + 1 : stop + 1])
        found.append(-joined(pieces)[-1].cpu().log_softmax(-1).gather(-1, target[:, None])[:, 0])

    model.run([Tile("probe", tuple(rides))], read)
    return found


def stepped_losses(model: Model) -> Tensor:
    """[WINDOWS, STEPS]: of the tokens after a question, each read by a sweep of its own."""
    windows = window_ids(model.decoder.vocab_size)
    after, stop = PREFIX + QUESTION, PREFIX + QUESTION + STEPS
    rides = [
        (ids[:PREFIX].tolist(), ids[PREFIX:after].tolist(), [ids[after:stop].tolist()])
        for ids in windows
    ]
    whole = [_ride(ids.tolist(), PREFIX, STEPS, EXACT, False) for ids in windows]
    engine = model.open(model.plan([Tile("steps", tuple(whole))]))
    try:
        logits = stepped(engine, rides, [EXACT], KeptCaches(STEPS))[:, 0, :-1]
    finally:
        engine.close()
    return -logits.log_softmax(-1).gather(-1, windows[:, after:stop, None])[..., 0]


def _ride(ids: list[int], prefix: int, scored: int, arm: Arm, streaming: bool) -> BranchedSequence:
    """The last `scored` tokens of `ids` are asked for; a baseline goes first."""
    own = tuple(ids if streaming else ids[prefix:])
    read = (len(own) - 1 - scored, len(own) - 1)
    branches = (
        Branch(EXACT, own, read, streaming, "baseline"),
        Branch(arm, own, read, streaming),
    )
    return BranchedSequence(() if streaming else tuple(ids[:prefix]), branches)
