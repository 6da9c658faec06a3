"""Branches that grow by a token in each sweep, and the same tokens in one pass."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from layersweep.kv.arms import Arm
from layersweep.sweep.caches import KeptCaches
from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.record import Pieces, joined
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile

Texts = list[tuple[list[int], list[int], list[list[int]]]]  # prefix, question, tokens of each arm


def texts(lengths: list[tuple[int, int]], arms: int, steps: int, vocab: int, seed: int) -> Texts:
    """Random ones, `lengths` of their prefixes and questions."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    return [
        (draw(prefix), draw(own), [draw(steps) for _ in range(arms)]) for prefix, own in lengths
    ]


def stepped(engine: Engine, rides: Texts, arms: list[Arm], caches: KeptCaches) -> Tensor:
    """Logits [sequence, arm, 1 + steps, V] of the question's last token and of each further one."""
    steps = len(rides[0][2][0])
    asked = [
        BranchedSequence(
            tuple(prefix),
            tuple(Branch(arm, tuple(own), (len(own) - 1, len(own))) for arm in arms),
        )
        for prefix, own, _ in rides
    ]
    found = [_read(engine, Tile("steps", tuple(asked)), caches)]
    for step in range(steps):
        grown = [
            BranchedSequence(
                (),
                tuple(
                    Branch(arm, (of[step],), (0, 1)) for arm, of in zip(arms, tokens, strict=True)
                ),
                len(prefix) + len(own) + step,
            )
            for prefix, own, tokens in rides
        ]
        found.append(_read(engine, Tile("steps", tuple(grown)), caches))
    return torch.cat(found, dim=2)


def in_one_pass(engine: Engine, rides: Texts, arms: list[Arm]) -> Tensor:
    """The same logits, each sequence alone."""
    whole = []
    for prefix, own, tokens in rides:
        branches = (
            Branch(arm, (*own, *of), (len(own) - 1, len(own) + len(of)))
            for arm, of in zip(arms, tokens, strict=True)
        )
        ride = BranchedSequence(tuple(prefix), tuple(branches))
        whole.append(_read(engine, Tile("whole", (ride,)), None))
    return torch.cat(whole)


def _read(engine: Engine, tile: Tile, caches: KeptCaches | None) -> Tensor:
    found: list[Tensor] = []

    def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        found.append(torch.stack(joined(pieces)).cpu())

    run_sweep(engine, [tile], read, caches=caches)
    return torch.stack(found)
