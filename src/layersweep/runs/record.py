"""What a study measures, window by window and needle by needle, apart from what measures it.

A record is filled by the jobs of a study, or put together from files where there is neither model
nor text: `facts` says in JSON what its numbers are of, and `Record.of` takes that back.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layersweep.kv.arms import EXACT
from layersweep.sweep.sequences import Tile
from layersweep.tasks.measured import (
    ArmInfo,
    ControlMeasurement,
    NeedleMeasurements,
    PerplexityMeasurements,
    TrialInfo,
    WindowInfo,
)

PERPLEXITY, NEEDLE = "perplexity", "needle"
CONTROL_WINDOWS = 4

Json = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A tile by its job and by what it holds of it: windows or trials [first, first + count)."""

    job: str
    first: int
    count: int

    @classmethod
    def of(cls, tile: Tile) -> Part:
        return cls(tile.name, tile.first, len(tile.sequences))


@dataclass
class PerplexityNumbers:
    """Numbers of `windows`; NaN until they are measured.

    `arms` leaves out the baseline. `scored`: tokens of a window whose loss counts. `controls`:
    names in the noise floor, on the first windows alone. nll [windows] nats per token; kl [windows,
    scored]; agree [windows]: share of first guesses that equal the baseline's; control_delta and
    control_kl likewise for the first few windows.
    """

    windows: list[WindowInfo]
    arms: list[ArmInfo]
    scored: int
    controls: list[str]

    def __post_init__(self) -> None:
        count, scored = len(self.windows), self.scored
        held = min(CONTROL_WINDOWS, count)
        names = [info.arm for info in self.arms]
        self.nll = {name: np.full(count, np.nan) for name in (EXACT.name, *names)}
        self.kl = {name: np.full((count, scored), np.nan, np.float32) for name in names}
        self.agree = {name: np.zeros(count) for name in names}
        self.control_delta = {name: np.full(held, np.nan) for name in self.controls}
        self.control_kl = {
            name: np.full((held, scored), np.nan, np.float32) for name in self.controls
        }

    def arrays(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """All that was measured of windows [first, first + count), by name."""
        tables: dict[str, dict[str, NDArray[Any]]] = {
            "nll": self.nll,
            "kl": self.kl,
            "agree": self.agree,
            "control_delta": self.control_delta,
            "control_kl": self.control_kl,
        }
        return {
            f"windows/{first}/{kind}/{arm}": table[first : first + count]
            for kind, of_arms in tables.items()
            for arm, table in of_arms.items()
        }

    def restore(self, first: int, count: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `arrays` gave. Raises KeyError or ValueError where it does not fit."""
        given = {name: arrays[name] for name in self.arrays(first, count)}
        for name, wanted in self.arrays(first, count).items():
            if (found := given[name]).shape != wanted.shape or found.dtype != wanted.dtype:
                raise ValueError(f"{name}: found {found.dtype} {found.shape}")
        for name, wanted in self.arrays(first, count).items():
            wanted[...] = given[name]

    def lines(self, first: int, count: int) -> list[Json]:
        """Lines of segments.jsonl for `count` windows from `first` on."""
        return [
            {
                "index": window.index,
                "tokens_sha": window.tokens_sha,
                "nll": {arm: finite(nll[window.index]) for arm, nll in self.nll.items()},
            }
            for window in self.windows[first : first + count]
        ]

    def measurements(
        self, bits: Mapping[str, float | None], nonfinite: set[str], seed: int
    ) -> PerplexityMeasurements:
        """Everything, for `summarize_perplexity`. `nonfinite` names arms that a sweep dropped."""
        dropped = nonfinite | {arm for arm, nll in self.nll.items() if not np.isfinite(nll).all()}
        return PerplexityMeasurements(
            windows=self.windows,
            arms=self.arms,
            nll=self.nll,
            kl=self.kl,
            top1={name: float(share.mean()) for name, share in self.agree.items()},
            bits_per_element=bits,
            controls={
                name: ControlMeasurement(self.control_delta[name], self.control_kl[name])
                for name in self.controls
            },
            status={info.arm: "nonfinite" if info.arm in dropped else "ok" for info in self.arms},
            seed=seed,
        )


@dataclass
class NeedleNumbers:
    """Verdicts on `trials` under `arms`, "exact" first. answer_nll: nats per answer token, None
    where it was not measured (mode "generate")."""

    trials: list[TrialInfo]
    arms: list[str]
    mode: str
    contexts: list[int]
    keys: int
    answer_tokens: list[int]
    outputs: dict[str, list[str]] = field(init=False)
    correct: dict[str, list[bool]] = field(init=False)
    answer_nll: dict[str, list[float | None]] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.trials)
        self.outputs = {name: [""] * count for name in self.arms}
        self.correct = {name: [False] * count for name in self.arms}
        self.answer_nll = {name: [None] * count for name in self.arms}

    def verdicts(self, first: int, count: int) -> list[Json]:
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

    def lines(self, first: int, count: int) -> list[Json]:
        """Lines of needle.jsonl for `count` trials from `first` on."""
        return [
            {
                "id": trial.id,
                "answer": trial.answer,
                "correct": {arm: hits[first + offset] for arm, hits in self.correct.items()},
                "outputs": {arm: texts[first + offset] for arm, texts in self.outputs.items()},
            }
            for offset, trial in enumerate(self.trials[first : first + count])
        ]

    def measurements(self) -> NeedleMeasurements:
        """Everything, for `summarize_needle`."""
        return NeedleMeasurements(
            trials=self.trials,
            arms=self.arms,
            mode=self.mode,
            contexts=self.contexts,
            keys=self.keys,
            answer_tokens=self.answer_tokens,
            outputs=self.outputs,
            correct=self.correct,
            answer_nll=self.answer_nll,
        )


@dataclass
class Record:
    """The numbers of a study. `parts` are all of its tiles, `seed` that of the resampling."""

    parts: list[Part]
    seed: int
    perplexity: PerplexityNumbers | None
    needle: NeedleNumbers | None

    def facts(self) -> Json:
        """What the numbers are of, as JSON; the numbers themselves are in files of sweeps."""
        perplexity, needle = self.perplexity, self.needle
        return {
            "parts": [asdict(part) for part in self.parts],
            "seed": self.seed,
            "perplexity": perplexity
            and {
                "windows": [asdict(window) for window in perplexity.windows],
                "arms": [asdict(arm) for arm in perplexity.arms],
                "scored": perplexity.scored,
                "controls": perplexity.controls,
            },
            "needle": needle
            and {
                "trials": [asdict(trial) for trial in needle.trials],
                "arms": needle.arms,
                "mode": needle.mode,
                "contexts": needle.contexts,
                "keys": needle.keys,
                "answer_tokens": needle.answer_tokens,
            },
        }

    @classmethod
    def of(cls, facts: Json) -> Record:
        """An empty record from `facts`. Raises KeyError or TypeError for anything else."""
        perplexity, needle = facts["perplexity"], facts["needle"]
        return cls(
            [Part(**part) for part in facts["parts"]],
            facts["seed"],
            perplexity
            and PerplexityNumbers(
                [WindowInfo(**window) for window in perplexity["windows"]],
                [ArmInfo(**arm) for arm in perplexity["arms"]],
                perplexity["scored"],
                perplexity["controls"],
            ),
            needle
            and NeedleNumbers(
                [TrialInfo(**trial) for trial in needle["trials"]],
                needle["arms"],
                needle["mode"],
                needle["contexts"],
                needle["keys"],
                needle["answer_tokens"],
            ),
        )

    def lines(self, part: Part) -> list[Json]:
        """What people read of a finished tile: a line per window or trial."""
        numbers = self.perplexity if part.job == PERPLEXITY else self.needle
        assert numbers is not None
        return numbers.lines(part.first, part.count)


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None
