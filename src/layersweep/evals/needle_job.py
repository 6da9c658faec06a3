"""Needle trials on a sweep: teacher-forced in one, or greedy generation in several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layersweep.evals.measured import NeedleMeasurements, TrialInfo
from layersweep.evals.needle import Trial, generated_correctly
from layersweep.evals.tokenizer import TextTokenizer
from layersweep.kv.arms import EXACT, Arm
from layersweep.sweep.attention import BranchCache
from layersweep.sweep.loop import LogitsReader
from layersweep.sweep.sequences import Branch, Sequence, Tile, tiles_of

TILE_TRIALS = 10
NEW_TOKENS = 16
NAME = "needle"

RunTiles = Callable[[list[Tile], LogitsReader, dict[tuple[int, int, int], BranchCache]], None]


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
    outputs: dict[str, list[str]] = field(init=False)
    correct: dict[str, list[bool]] = field(init=False)
    answer_nll: dict[str, list[float | None]] = field(init=False)
    # trial -> [2, arms, answer tokens] float64: first guesses, NLL of the answer
    _judged: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        names, count = [arm.name for arm in self._all], len(self.trials)
        self.outputs = {name: [""] * count for name in names}
        self.correct = {name: [False] * count for name in names}
        self.answer_nll = {name: [None] * count for name in names}

    @property
    def _all(self) -> list[Arm]:
        return [EXACT, *self.arms]

    def tiles(self) -> list[Tile]:
        """Teacher mode: the answer is part of the branch and is read, not generated."""
        return tiles_of(NAME, [self._teacher(trial) for trial in self.trials], TILE_TRIALS)

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
                self.outputs[arm.name][index] = self.tokenizer.decode(guess)
                self.correct[arm.name][index] = guess == answer
                self.answer_nll[arm.name][index] = losses.mean().item()
        self._judged.clear()

    def verdicts(self, first: int, count: int) -> list[dict[str, Any]]:
        """All that came out of trials [first, first + count), as JSON."""
        tables: dict[str, Mapping[str, Many[Any]]] = {
            "outputs": self.outputs,
            "correct": self.correct,
            "answer_nll": self.answer_nll,
        }
        return [
            {"trial": index}
            | {
                kind: {arm: row[index] for arm, row in table.items()}
                for kind, table in tables.items()
            }
            for index in range(first, first + count)
        ]

    def restore(self, verdicts: Many[Mapping[str, Any]]) -> None:
        """Put back what `verdicts` gave. Raises KeyError or IndexError where it does not fit."""
        for verdict in verdicts:
            for arm in self.outputs:
                self.outputs[arm][verdict["trial"]] = verdict["outputs"][arm]
                self.correct[arm][verdict["trial"]] = verdict["correct"][arm]
                self.answer_nll[arm][verdict["trial"]] = verdict["answer_nll"][arm]

    def generate(self, run: RunTiles) -> None:
        """Greedy generation of NEW_TOKENS tokens for all trials and arms: a sweep per token.

        The first sweep reads each trial up to the answer and keeps its caches; each further
        one adds a token to every branch.
        """
        caches: dict[tuple[int, int, int], BranchCache] = {}
        chosen: dict[int, list[list[int]]] = {}

        def pick(tile: Tile, number: int, sequence: Sequence, logits: list[Tensor]) -> None:
            best = [int(branch[-1].argmax()) for branch in logits]
            tokens = chosen.setdefault(tile.first + number, [[] for _ in best])
            for branch, token in zip(tokens, best, strict=True):
                branch.append(token)

        sequences = [self._question(trial) for trial in self.trials]
        run(tiles_of(NAME, sequences, TILE_TRIALS), pick, caches)
        for step in range(NEW_TOKENS - 1):
            sequences = [
                self._step(trial, step, chosen[index]) for index, trial in enumerate(self.trials)
            ]
            run(tiles_of(NAME, sequences, TILE_TRIALS), pick, caches)
        for index, trial in enumerate(self.trials):
            for arm, tokens in zip(self._all, chosen[index], strict=True):
                text = self.tokenizer.decode(tokens)
                self.outputs[arm.name][index] = text
                self.correct[arm.name][index] = generated_correctly(text, trial.answer)

    def _question(self, trial: Trial) -> Sequence:
        ids = trial.branch_ids[: -trial.answer_length]
        last = (len(ids) - 1, len(ids))
        return Sequence(trial.prefix_ids, tuple(Branch(arm, ids, last) for arm in self._all))

    def _step(self, trial: Trial, step: int, chosen: list[list[int]]) -> Sequence:
        past = len(trial.prefix_ids) + len(trial.branch_ids) - trial.answer_length + step
        branches = (
            Branch(arm, (tokens[-1],), (0, 1))
            for arm, tokens in zip(self._all, chosen, strict=True)
        )
        return Sequence((), tuple(branches), past)

    def measurements(self) -> NeedleMeasurements:
        """Everything measured, for `summarize_needle`."""
        return NeedleMeasurements(
            trials=[
                TrialInfo(str(t.id), t.context, t.depth, t.achieved_depth, t.key, t.answer)
                for t in self.trials
            ],
            arms=[arm.name for arm in self._all],
            mode=self.mode,
            contexts=self.contexts,
            keys=self.keys,
            answer_tokens=[trial.answer_length for trial in self.trials],
            outputs=self.outputs,
            correct=self.correct,
            answer_nll=self.answer_nll,
        )
