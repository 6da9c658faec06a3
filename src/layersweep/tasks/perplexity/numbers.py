"""The numbers of a perplexity study, window by window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layersweep.kv.arms import EXACT
from layersweep.tasks.arms import ArmInfo, KvBytes
from layersweep.tasks.finite import finite
from layersweep.tasks.perplexity.measurements import (
    ControlMeasurement,
    PerplexityMeasurements,
    WindowInfo,
)
from layersweep.tasks.task import Json, Stored

CONTROL_WINDOWS = 4


@dataclass
class PerplexityNumbers:
    """Numbers of `windows`; NaN until they are measured.

    `arms` leaves out the baseline. `scored`: tokens of a window whose loss counts. `controls`:
    names in the noise floor, on the first windows alone. `kv_bytes`: of every arm's cache, the
    baseline's too, None where nobody knows. nll [windows] nats per token; kl [windows,
    scored]; agree [windows]: share of first guesses that equal the baseline's; control_delta and
    control_kl likewise for the first few windows.
    """

    windows: list[WindowInfo]
    arms: list[ArmInfo]
    scored: int
    controls: list[str]
    kv_bytes: dict[str, KvBytes | None]

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

    def facts(self) -> Json:
        return {
            "windows": [asdict(window) for window in self.windows],
            "arms": [asdict(arm) for arm in self.arms],
            "scored": self.scored,
            "controls": self.controls,
            "kv_bytes": self.kv_bytes,
        }

    @classmethod
    def of(cls, facts: Json) -> PerplexityNumbers:
        """Empty ones from `facts`. Raises KeyError or TypeError for anything else."""
        return cls(
            [WindowInfo(**window) for window in facts["windows"]],
            [ArmInfo(**arm) for arm in facts["arms"]],
            facts["scored"],
            facts["controls"],
            facts["kv_bytes"],
        )

    @property
    def arm_names(self) -> list[str]:
        return [info.arm for info in self.arms]

    def stored(self, first: int, count: int) -> Stored:
        return Stored(self._arrays(first, count), [])

    def restore(self, first: int, count: int, stored: Stored) -> None:
        held = self._arrays(first, count)
        given = {name: stored.arrays[name] for name in held}
        for name, wanted in held.items():
            if (found := given[name]).shape != wanted.shape or found.dtype != wanted.dtype:
                raise ValueError(f"{name}: found {found.dtype} {found.shape}")
        for name, wanted in held.items():
            wanted[...] = given[name]

    def _arrays(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """All that was measured of windows [first, first + count), by name, as views."""
        tables: dict[str, dict[str, NDArray[Any]]] = {
            "nll": self.nll,
            "kl": self.kl,
            "agree": self.agree,
            "control_delta": self.control_delta,
            "control_kl": self.control_kl,
        }
        return {
            f"{kind}/{arm}": table[first : first + count]
            for kind, of_arms in tables.items()
            for arm, table in of_arms.items()
        }

    def lines(self, first: int, count: int) -> list[Json]:
        return [
            {
                "index": window.index,
                "tokens_sha": window.tokens_sha,
                "nll": {arm: finite(nll[window.index]) for arm, nll in self.nll.items()},
            }
            for window in self.windows[first : first + count]
        ]

    def summarize(self, bits: Mapping[str, float | None], nonfinite: set[str], seed: int) -> Json:
        from layersweep.tasks.perplexity.summary import summarize_perplexity  # brings scipy

        return summarize_perplexity(self.measurements(bits, nonfinite, seed))

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
            kv_bytes=self.kv_bytes,
            controls={
                name: ControlMeasurement(self.control_delta[name], self.control_kl[name])
                for name in self.controls
            },
            status={info.arm: "nonfinite" if info.arm in dropped else "ok" for info in self.arms},
            seed=seed,
        )
