"""Needle trials on a sweep: teacher-forced in one, or greedy generation in several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from layersweep.kv.arms import EXACT, Arm
from layersweep.model import maths
from layersweep.sweep.record import Pieces, joined
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile, tiles_of
from layersweep.tasks.needle.measurements import TrialInfo
from layersweep.tasks.needle.numbers import NeedleNumbers
from layersweep.tasks.needle.trials import Trial, generated_correctly, make_trials
from layersweep.tasks.settings import EvalSettings
from layersweep.tasks.task import Json, Source
from layersweep.text.tokenizer import TextTokenizer, check_ids

if TYPE_CHECKING:
    from layersweep.tasks.task import RunTiles

TILE_TRIALS = 10
# Generated trials: with fewer at once, two cards of 14 GiB hold Mixtral-8x7B beside 4096 tokens.
TILE_GENERATED = 5
NEW_TOKENS = 16
TYPICAL_BRANCH = 60  # tokens of question, answer prefix and answer, where no text is there to ask


@dataclass
class NeedleTask:
    """Trials under the arms, which leave out the baseline.

    In teacher mode an arm is correct iff every answer token is its argmax, which is what greedy
    decoding would produce.
    """

    trials: list[Trial]
    arms: list[Arm]
    tokenizer: TextTokenizer
    settings: EvalSettings
    numbers: NeedleNumbers = field(init=False)
    # trial -> [2, arms, answer tokens] float64: first guesses, NLL of the answer
    _judged: list[tuple[int, Tensor]] = field(default_factory=list)

    name: ClassVar[str] = "needle"
    new_tokens: ClassVar[int] = NEW_TOKENS

    def __post_init__(self) -> None:
        self.numbers = NeedleNumbers(
            trials=[
                TrialInfo(
                    str(t.id), t.context, t.depth, t.achieved_depth, t.key, t.answer, *t.haystack
                )
                for t in self.trials
            ],
            arms=[arm.name for arm in self._all],
            mode=self.settings.niah_mode,
            contexts=list(self.settings.niah_contexts),
            keys=self.settings.niah_keys,
            answer_tokens=[trial.answer_length for trial in self.trials],
        )

    @classmethod
    def prepare(cls, source: Source) -> NeedleTask:
        settings, decoder = source.settings, source.decoder
        trials = make_trials(
            source.encoded, contexts=settings.niah_contexts,
            depths=settings.niah_depths, per_depth=settings.niah_per_depth,
            keys=settings.niah_keys, bos=settings.bos, seed=settings.seed,
            max_context=decoder.max_position_embeddings,
        )  # fmt: skip
        for trial in trials:
            check_ids(trial.prefix_ids, decoder.vocab_size)
            check_ids(trial.branch_ids, decoder.vocab_size)
        return cls(trials, source.arms, source.encoded.tokenizer, settings)

    @classmethod
    def longest(cls, settings: EvalSettings) -> int:
        return max(settings.niah_contexts, default=0)

    @classmethod
    def placeholders(cls, settings: EvalSettings, arms: Sequence[Arm]) -> list[Tile]:
        branch, streaming = (0,) * TYPICAL_BRANCH, settings.streaming
        trials: list[BranchedSequence] = []
        for context in settings.niah_contexts:
            prefix = (0,) * (context - len(branch))
            one = _ride(prefix, branch, len(branch) - 1, arms, streaming)
            trials += [one] * (len(settings.niah_depths) * settings.niah_per_depth)
        return tiles_of(cls.name, trials, tile_size(settings))

    @property
    def generated(self) -> bool:
        return self.settings.generates

    @property
    def _all(self) -> list[Arm]:
        return [EXACT, *self.arms]

    def tiles(self) -> list[Tile]:
        """Teacher mode: the answer is part of the branch and is read, not generated. Of generated
        trials these are the shapes, and which of them go together."""
        rides = [
            _ride(t.prefix_ids, t.branch_ids, t.answer_length, self.arms, self.settings.streaming)
            for t in self.trials
        ]
        return tiles_of(self.name, rides, tile_size(self.settings))

    def read(self, tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        """Judge one trial from the logits [answer tokens, V] of each branch; `settle` brings
        the verdicts to the host."""
        logits = joined(pieces)
        index = tile.first + number
        trial = self.trials[index]
        answer = torch.tensor(trial.branch_ids[-trial.answer_length :], device=logits[0].device)
        best = torch.stack([branch.argmax(-1) for branch in logits])
        losses = torch.stack([maths.losses(branch, answer) for branch in logits])
        self._judged.append((index, torch.stack((best.double(), losses.double()))))

    def forget(self) -> None:
        self._judged.clear()

    def settle(self) -> None:
        for index, judged in self._judged:
            trial, (best, nll) = self.trials[index], judged.cpu()
            answer = list(trial.branch_ids[-trial.answer_length :])
            for arm, guess, losses in zip(self._all, best.long().tolist(), nll, strict=True):
                self.numbers.outputs[arm.name][index] = self.tokenizer.decode(guess)
                self.numbers.correct[arm.name][index] = guess == answer
                self.numbers.answer_nll[arm.name][index] = losses.mean().item()
        self._judged.clear()

    def check_baseline(self, first: int, count: int) -> None:
        """Answers are judged by their argmax; a non-finite baseline shows in hidden states."""

    def protocol(self) -> Json:
        settings = self.settings
        return {
            "niah": {
                "contexts": list(settings.niah_contexts),
                "depths": list(settings.niah_depths),
                "per_depth": settings.niah_per_depth,
                "keys": settings.niah_keys,
                "mode": settings.niah_mode,
            }
        }

    def generate(self, run: RunTiles, first: Sequence[Sequence[Tile]]) -> None:
        """Greedy generation of NEW_TOKENS tokens for the trials of all tiles in `first`, all arms:
        a sweep per token.

        First sweeps, each with some of the tiles, read their trials up to the answer; `run` keeps
        the caches, to which every further sweep adds a token of every branch, all tiles together.
        """
        chosen: dict[int, list[list[int]]] = {}

        def pick(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
            best = [int(branch[-1].argmax()) for branch in joined(pieces)]
            tokens = chosen.setdefault(tile.first + number, [[] for _ in best])
            for branch, token in zip(tokens, best, strict=True):
                branch.append(token)

        def rides(
            tiles: Sequence[Tile], sequence_of: Callable[[int], BranchedSequence]
        ) -> list[Tile]:
            return [
                Tile(self.name, tuple(sequence_of(index) for index in _trials_of(tile)), tile.first)
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

    def _question(self, index: int) -> BranchedSequence:
        trial = self.trials[index]
        ids = trial.branch_ids[: -trial.answer_length]
        last = (len(ids) - 1, len(ids))
        return BranchedSequence(
            trial.prefix_ids, _branches(self.arms, [ids] * len(self._all), last)
        )

    def _step(self, index: int, chosen: list[list[int]]) -> BranchedSequence:
        trial = self.trials[index]
        past = len(trial.prefix_ids) + len(trial.branch_ids) - trial.answer_length
        past += len(chosen[0]) - 1
        ids = [(tokens[-1],) for tokens in chosen]
        return BranchedSequence((), _branches(self.arms, ids, (0, 1)), past)


def tile_size(settings: EvalSettings) -> int:
    """Trials that are computed together."""
    return TILE_GENERATED if settings.generates else TILE_TRIALS


def _ride(
    prefix: tuple[int, ...],
    branch: tuple[int, ...],
    answer: int,
    arms: Sequence[Arm],
    streaming: bool,
) -> BranchedSequence:
    """A trial's sequence, whose last `answer` tokens are read."""
    ids = (*prefix, *branch) if streaming else branch
    read = (len(ids) - 1 - answer, len(ids) - 1)
    branches = _branches(arms, [ids] * (1 + len(arms)), read, streaming)
    return BranchedSequence(() if streaming else prefix, branches)


def _branches(
    arms: Sequence[Arm],
    ids: Sequence[tuple[int, ...]],
    read: tuple[int, int],
    streaming: bool = False,
) -> tuple[Branch, ...]:
    """The baseline's, then one for each arm."""
    baseline = Branch(EXACT, ids[0], read, streaming, "baseline")
    pairs = zip(arms, ids[1:], strict=True)
    return baseline, *(Branch(arm, of, read, streaming) for arm, of in pairs)


def _trials_of(tile: Tile) -> range:
    return range(tile.first, tile.first + len(tile.sequences))
