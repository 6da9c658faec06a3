"""The numbers of a needle study, trial by trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from layersweep.kv.arms import EXACT
from layersweep.tasks.needle.measurements import NeedleMeasurements, TrialInfo
from layersweep.tasks.task import Json, Stored


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

    def facts(self) -> Json:
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "arms": self.arms,
            "mode": self.mode,
            "contexts": self.contexts,
            "keys": self.keys,
            "answer_tokens": self.answer_tokens,
        }

    @classmethod
    def of(cls, facts: Json) -> NeedleNumbers:
        """Empty ones from `facts`. Raises KeyError or TypeError for anything else."""
        return cls(
            [TrialInfo(**trial) for trial in facts["trials"]],
            facts["arms"],
            facts["mode"],
            facts["contexts"],
            facts["keys"],
            facts["answer_tokens"],
        )

    @property
    def arm_names(self) -> list[str]:
        return [name for name in self.arms if name != EXACT.name]

    def stored(self, first: int, count: int) -> Stored:
        return Stored({}, self._verdicts(first, count))

    def restore(self, first: int, count: int, stored: Stored) -> None:
        for verdict in stored.rows:
            for arm in self.outputs:
                self.outputs[arm][verdict["trial"]] = verdict["outputs"][arm]
                self.correct[arm][verdict["trial"]] = verdict["correct"][arm]
                self.answer_nll[arm][verdict["trial"]] = verdict["answer_nll"][arm]

    def _verdicts(self, first: int, count: int) -> list[Json]:
        """All that came out of trials [first, first + count), as JSON."""
        tables: dict[str, Mapping[str, Sequence[Any]]] = {
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

    def lines(self, first: int, count: int) -> list[Json]:
        return [
            {
                "id": trial.id,
                "answer": trial.answer,
                "correct": {arm: hits[first + offset] for arm, hits in self.correct.items()},
                "outputs": {arm: texts[first + offset] for arm, texts in self.outputs.items()},
            }
            for offset, trial in enumerate(self.trials[first : first + count])
        ]

    def summarize(self, bits: Mapping[str, float | None], nonfinite: set[str], seed: int) -> Json:
        from layersweep.tasks.needle.summary import summarize_needle  # brings scipy

        return summarize_needle(self.measurements(seed))

    def measurements(self, seed: int) -> NeedleMeasurements:
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
            seed=seed,
        )
