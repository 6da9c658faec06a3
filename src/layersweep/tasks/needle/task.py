"""Needle trials on a sweep: teacher-forced in one, or greedy generation in several."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.kv.arms import EXACT, Arm
from layersweep.runs.record import NEEDLE, NeedleNumbers
from layersweep.sweep.loop import LogitsReader
from layersweep.sweep.sequences import Branch, Sequence, Tile, tiles_of
from layersweep.tasks.measured import TrialInfo
from layersweep.tasks.needle.trials import Trial, generated_correctly
from layersweep.text.tokenizer import TextTokenizer

TILE_TRIALS = 10
# Generated trials: with fewer at once, two cards of 14 GiB hold Mixtral-8x7B beside 4096 tokens.
TILE_GENERATED = 5
NEW_TOKENS = 16

RunTiles = Callable[[list[Tile], LogitsReader], None]


@dataclass
class NeedleJob:
    """The tiles of a needle study, and what came out of them.

    `arms` leaves out the baseline, which is branch 0. In teacher mode an arm is correct iff
    every answer token is its argmax, which is what greedy decoding would produce.
    """

    trials: list[Trial]
    arms: list[Arm]
    tokenizer: TextTokenizer
    streaming: bool
    contexts: Many[int]
    keys: int
    mode: str
    numbers: NeedleNumbers = field(init=False)
    # trial -> [2, arms, answer tokens] float64: first guesses, NLL of the answer
    _judged: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.numbers = NeedleNumbers(
            trials=[
                TrialInfo(str(t.id), t.context, t.depth, t.achieved_depth, t.key, t.answer)
                for t in self.trials
            ],
            arms=[arm.name for arm in self._all],
            mode=self.mode,
            contexts=list(self.contexts),
            keys=self.keys,
            answer_tokens=[trial.answer_length for trial in self.trials],
        )

    @property
    def _all(self) -> list[Arm]:
        return [EXACT, *self.arms]

    def tiles(self) -> list[Tile]:
        """Teacher mode: the answer is part of the branch and is read, not generated. Of generated
        trials these are the shapes, and which of them go together."""
        return tiles_of(
            NEEDLE, [self._teacher(trial) for trial in self.trials], tile_size(self.mode)
        )

    def _teacher(self, trial: Trial) -> Sequence:
        if self.streaming:
            ids = (*trial.prefix_ids, *trial.branch_ids)
            read = (len(ids) - trial.answer_length - 1, len(ids) - 1)
            return Sequence((), tuple(Branch(arm, ids, read, streaming=True) for arm in self._all))
        last = len(trial.branch_ids) - 1
        read = (last - trial.answer_length, last)
        branches = (Branch(arm, trial.branch_ids, read) for arm in self._all)
        return Sequence(trial.prefix_ids, tuple(branches))

    def read(self, tile: Tile, number: int, sequence: Sequence, logits: list[Tensor]) -> None:
        """Judge one trial from the logits [answer tokens, V] of each branch; `settle` brings
        the verdicts to the host."""
        index = tile.first + number
        trial = self.trials[index]
        answer = torch.tensor(trial.branch_ids[-trial.answer_length :], device=logits[0].device)
        best = torch.stack([branch.argmax(-1) for branch in logits])
        scores = [branch.log_softmax(-1).gather(1, answer[:, None])[:, 0] for branch in logits]
        self._judged.append((index, torch.stack((best.double(), -torch.stack(scores).double()))))

    def forget(self) -> None:
        """Drop what was read and not settled."""
        self._judged.clear()

    def settle(self) -> None:
        """Take over the trials read so far."""
        for index, judged in self._judged:
            trial, (best, nll) = self.trials[index], judged.cpu()
            answer = list(trial.branch_ids[-trial.answer_length :])
            for arm, guess, losses in zip(self._all, best.long().tolist(), nll, strict=True):
                self.numbers.outputs[arm.name][index] = self.tokenizer.decode(guess)
                self.numbers.correct[arm.name][index] = guess == answer
                self.numbers.answer_nll[arm.name][index] = losses.mean().item()
        self._judged.clear()

    def generate(self, run: RunTiles, first: Many[Many[Tile]]) -> None:
        """Greedy generation of NEW_TOKENS tokens for the trials of all tiles in `first`, all arms:
        a sweep per token.

        First sweeps, each with some of the tiles, read their trials up to the answer; `run` keeps
        the caches, to which every further sweep adds a token of every branch, all tiles together.
        """
        chosen: dict[int, list[list[int]]] = {}

        def pick(tile: Tile, number: int, sequence: Sequence, logits: list[Tensor]) -> None:
            best = [int(branch[-1].argmax()) for branch in logits]
            tokens = chosen.setdefault(tile.first + number, [[] for _ in best])
            for branch, token in zip(tokens, best, strict=True):
                branch.append(token)

        def rides(tiles: Many[Tile], sequence_of: Callable[[int], Sequence]) -> list[Tile]:
            return [
                Tile(NEEDLE, tuple(sequence_of(index) for index in _trials_of(tile)), tile.first)
                for tile in tiles
            ]

        for tiles in first:
            run(rides(tiles, self._question), pick)
        together = [tile for tiles in first for tile in tiles]
        for _ in range(NEW_TOKENS - 1):
            run(rides(together, lambda index: self._step(index, chosen[index])), pick)
        for index, tokens_of in chosen.items():
            for arm, tokens in zip(self._all, tokens_of, strict=True):
                text = self.tokenizer.decode(tokens)
                self.numbers.outputs[arm.name][index] = text
                correct = generated_correctly(text, self.trials[index].answer)
                self.numbers.correct[arm.name][index] = correct

    def _question(self, index: int) -> Sequence:
        trial = self.trials[index]
        ids = trial.branch_ids[: -trial.answer_length]
        last = (len(ids) - 1, len(ids))
        return Sequence(trial.prefix_ids, tuple(Branch(arm, ids, last) for arm in self._all))

    def _step(self, index: int, chosen: list[list[int]]) -> Sequence:
        trial = self.trials[index]
        past = len(trial.prefix_ids) + len(trial.branch_ids) - trial.answer_length
        past += len(chosen[0]) - 1
        branches = (
            Branch(arm, (tokens[-1],), (0, 1))
            for arm, tokens in zip(self._all, chosen, strict=True)
        )
        return Sequence((), tuple(branches), past)


def tile_size(mode: str) -> int:
    """Trials that are computed together."""
    return TILE_GENERATED if mode == "generate" else TILE_TRIALS


def _trials_of(tile: Tile) -> range:
    return range(tile.first, tile.first + len(tile.sequences))
