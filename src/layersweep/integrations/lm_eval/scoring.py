"""Continuations of contexts under every arm, in one sweep. It knows nothing of lm-eval.

    context        t0 t1 t2 t3 | t4            t4 predicts the first token of each continuation,
    continuations                a0 a1 a2      so it is the first row of each branch
                                 b0

    sequence       prefix  t0 t1 t2 t3         encoded once per codec
                   branch  t4 a0 a1  exact     predicts a0 a1 a2
                   branch  t4 a0 a1  K3V2
                   branch  t4        exact     predicts b0
                   branch  t4        K3V2

Every prediction reads the whole of the prefix through the arm's codec; a branch reads its own
tokens exactly. Continuations that differ in their last token alone share a branch.

A rolling window, and a continuation of an empty context, have nothing before their first
prediction but one token: a codec would have no prefix to take, and every arm would equal the exact
cache. There each token reads what a growing cache holds once it is in (`Branch.streaming`). This is
what such a text meets when it goes through a cache token by token. The last rolling window of a
text has a context; it is read the same way, so that one text is measured in one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv.arms import EXACT, Arm, parse_arms
from layersweep.sweep.model import SCORE_TILE, Model
from layersweep.sweep.record import Pieces, Progress, SweepRecord
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile

TILE_ROWS = 51_200  # of a standard study's tile: 20 windows of 1,024 + 3 x 512 tokens

Ids = tuple[int, ...]
Score = tuple[float, bool]  # log-probability in nats, whether greedy decoding would produce it


@dataclass(frozen=True)
class HarnessArm:
    """What an arm of --kv is for a context that is there as a whole, and for a cache that tokens
    read as it grows. Only a bare name means two things."""

    whole: Arm
    growing: Arm

    @property
    def name(self) -> str:
        return self.whole.name

    def of(self, *, grows: bool) -> Arm:
        return self.growing if grows else self.whole


EXACT_CACHE = HarnessArm(EXACT, EXACT)


def harness_arms(kv: str) -> list[HarnessArm]:
    """The arms of a comma-separated list, without `exact`; none for "". Raises InputError."""
    if not kv.strip():
        return []
    found = {arm.name: HarnessArm(arm, arm) for arm in parse_arms(kv)}
    for item in kv.split(","):
        both = zip(parse_arms(item), parse_arms(item, growing=True), strict=True)
        for whole, growing in both:
            other = found[whole.name].growing
            if other.name not in (whole.name, growing.name):
                raise InputError(
                    f"--kv {kv}: found {other.name} and {growing.name} for caches that grow, which "
                    f"are both {whole.name} for a context, needed one of them",
                    hint="leave one out",
                )
            found[whole.name] = HarnessArm(whole, growing)
    return list(found.values())


@dataclass(frozen=True)
class Scored:
    """`targets` to predict after `prefix`, by as many last rows of `branch`. Without a prefix the
    cache is read as it grows."""

    prefix: Ids
    branch: Ids
    targets: Ids

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], limit: int) -> Scored:
        """A pair as lm-eval's HF backend reads it: the last `limit` tokens but for the very last.
        Raises InputError where they cannot hold the continuation, or one of the two is empty."""
        count = len(continuation)
        if not context or not 0 < count <= limit:
            raise InputError(
                f"lm-eval: found a context of {len(context)} and a continuation of {count} tokens, "
                f"needed a context, and a continuation of 1 to {limit}",
                hint="--max-length up to the model's limit, or leave the task out",
            )
        ids = (*context, *continuation)[-(limit + 1) : -1]
        return cls(ids[:-count], ids[-count:], tuple(continuation))

    def rolling(self) -> Scored:
        """The same as a window of a text, which is read as the cache grows from its first token."""
        return Scored((), (*self.prefix, *self.branch), self.targets)

    @property
    def grows(self) -> bool:
        return not self.prefix


@dataclass
class Ride:
    """A prefix and the distinct branches that continue it, by tokens and how many rows are read,
    each with who wants it: the index of a Scored, and its targets."""

    prefix: Ids
    branches: dict[tuple[Ids, int], list[tuple[int, Ids]]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, list[int]]:
        return len(self.prefix), [len(ids) for ids, _ in self.branches]

    def sequence(self, arms: Sequence[HarnessArm]) -> BranchedSequence:
        """Branch b under arm a is number b * len(arms) + a."""
        grows = not self.prefix
        return BranchedSequence(
            self.prefix,
            tuple(
                Branch(
                    arm.of(grows=grows), ids, (len(ids) - read, len(ids)), streaming=grows,
                    role="baseline" if arm == EXACT_CACHE else "arm",
                )
                for ids, read in self.branches
                for arm in arms
            ),
        )  # fmt: skip


def rides_of(wanted: Sequence[Scored]) -> list[Ride]:
    """What shares a prefix rides together; a cache that grows shares nothing. Those of equal shape
    stand next to each other, since they are attended together."""
    rides: dict[tuple[Ids, Ids], Ride] = {}
    for index, one in enumerate(wanted):
        ride = rides.setdefault((one.prefix, one.branch if one.grows else ()), Ride(one.prefix))
        branch = one.branch, len(one.targets)
        ride.branches.setdefault(branch, []).append((index, one.targets))
    return sorted(rides.values(), key=lambda ride: ride.shape, reverse=True)


def tiles_of_rides(rides: Sequence[Ride], arms: Sequence[HarnessArm]) -> list[Tile]:
    """Tiles of at most 20 prefixes and TILE_ROWS rows, or of one prefix: no budget decides, so that
    numbers do not depend on the machine."""
    tiles: list[Tile] = []
    some: list[BranchedSequence] = []
    rows = first = 0
    for ride in rides:
        sequence = ride.sequence(arms)
        if some and (len(some) == SCORE_TILE or rows + sequence.rows > TILE_ROWS):
            tiles.append(Tile("lm-eval", tuple(some), first))
            first, rows, some = first + len(some), 0, []
        some.append(sequence)
        rows += sequence.rows
    return [*tiles, Tile("lm-eval", tuple(some), first)] if some else tiles


@dataclass(frozen=True)
class Scores:
    """`of[i][a]`: the score of the i-th Scored under arm a. `ill`: arms by number that gave
    something that is not finite, and where."""

    of: list[list[Score]]
    ill: dict[int, str]
    record: SweepRecord


def score(
    model: Model, wanted: Sequence[Scored], arms: Sequence[HarnessArm],
    progress: Progress = lambda phase, done, total: None,
) -> Scores:  # fmt: skip
    """All of `wanted` under all `arms`, in one sweep if their hidden states fit the budget.

    Losses and argmax are taken in float32 and summed in float64, as precise as lm-eval's HF
    backend. Raises BudgetError for what cannot fit.
    """
    rides, ops = rides_of(wanted), model.compute.ops
    tiles = tiles_of_rides(rides, arms)
    # log-probability, and how many targets are not the argmax: one copy to the host at the end
    sums = torch.zeros(len(wanted), len(arms), 2, dtype=torch.float64, device=model.compute.device)

    def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        ride = rides[tile.first + number]
        goals = [
            [(index, torch.tensor(targets, device=sums.device)) for index, targets in those]
            for those in ride.branches.values()
        ]
        for at, logits in pieces:
            for place, rows in enumerate(logits):
                branch, arm = divmod(place, len(arms))
                best = rows.argmax(-1)
                for index, targets in goals[branch]:
                    goal: Tensor = targets[at]
                    if not len(goal):  # of a shorter branch; kernels take no empty input
                        continue
                    sums[index, arm, 0] -= ops.losses(rows, goal).sum(dtype=torch.float64)
                    sums[index, arm, 1] += (best != goal).sum()

    record = model.run(tiles, read, progress=progress)
    of = [[(likelihood, missed == 0) for likelihood, missed in by_arm] for by_arm in sums.tolist()]
    return Scores(of, _ill(sums, record, len(arms)), record)


def _ill(sums: Tensor, record: SweepRecord, arms: int) -> dict[int, str]:
    """Arms with something that is not finite: in hidden states, or in the head's logits alone."""
    first: dict[int, int] = {}
    for (_, _, branch), layer in record.nonfinite.items():
        for arm in range(arms) if branch < 0 else [branch % arms]:
            first[arm] = min(layer, first.get(arm, layer))
    found = {arm: f"non-finite numbers from layer {layer} on" for arm, layer in first.items()}
    bad = (~sums.isfinite()).any(dim=2).any(dim=0)
    for arm in bad.nonzero()[:, 0].tolist():
        found.setdefault(arm, "non-finite logits")
    return found
