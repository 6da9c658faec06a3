"""Paired perplexity: every window is scored with the exact cache and with each arm's cache.

`prefill`: the prefix is computed once, exactly; each arm's branch scores the continuation
with the prefix read through its codec. `streaming`: every arm is a sequence of its own, in
which every read goes through the codec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layersweep.evals.measured import (
    ArmInfo,
    ControlMeasurement,
    PerplexityMeasurements,
    WindowInfo,
)
from layersweep.evals.windows import Window
from layersweep.kv.arms import EXACT, Arm, identity_arm
from layersweep.kv.methods import METHODS
from layersweep.model import maths
from layersweep.sweep.sequences import Branch, Sequence, Tile, tiles_of

TILE_SEGMENTS = 20
CONTROL_WINDOWS = 4
NAME = "perplexity"


def arm_info(arm: Arm, device: torch.device) -> ArmInfo:
    return ArmInfo(
        arm.name, arm.requested, arm.method, arm.key_bits, arm.value_bits,
        arm.codec_version or "", arm.simulated, arm.encoder_on(device),
    )  # fmt: skip


def control_arms(arms: Many[Arm]) -> list[tuple[str, Arm]]:
    """(name in the noise floor, arm): each method's identity, and the exact cache last.

    A method's arm with options comes before one without: they may add a transform. What
    transforms somebody's own codec has is not known: it gets none.
    """
    of: dict[str, Arm] = {}
    for arm in arms:
        if arm.method in METHODS and (arm.options or arm.method not in of):
            of[arm.method] = arm
    identities = [(f"identity:{method}", identity_arm(arm)) for method, arm in of.items()]
    return [*identities, ("exact", EXACT)]


@dataclass
class PerplexityJob:
    """The tiles of a perplexity study, and what is measured on them.

    `arms` leaves out the baseline, which is always branch 0. `score` as
    `maths.score_branches`.
    """

    windows: list[Window]
    arms: list[Arm]
    streaming: bool
    score: Callable[[list[Tensor], Tensor], Tensor] = maths.score_branches
    controls: list[tuple[str, Arm]] = field(init=False)
    _scored: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.controls = control_arms(self.arms)
        count = len(self.windows)
        scored = len(self.windows[0].ids) - self.windows[0].prefix - 1
        self.nll = {name: np.full(count, np.nan) for name in ("exact", *self._arm_names)}
        self.kl = {n: np.full((count, scored), np.nan, np.float32) for n in self._arm_names}
        self.agree = {name: np.zeros(count) for name in self._arm_names}
        held = min(CONTROL_WINDOWS, count)
        self.control_delta = {name: np.full(held, np.nan) for name, _ in self.controls}
        self.control_kl = {
            name: np.full((held, scored), np.nan, np.float32) for name, _ in self.controls
        }

    @property
    def _arm_names(self) -> list[str]:
        return [arm.name for arm in self.arms]

    def tiles(self) -> list[Tile]:
        return tiles_of(NAME, [self._sequence(w) for w in self.windows], TILE_SEGMENTS)

    def _sequence(self, window: Window) -> Sequence:
        arms = [EXACT, *self.arms]
        if window.index < CONTROL_WINDOWS:
            arms += [arm for _, arm in self.controls]
        if self.streaming:
            read = (window.prefix, len(window.ids) - 1)
            branches = [Branch(arm, window.ids, read, streaming=True) for arm in arms]
            return Sequence((), tuple(branches))
        continuation = window.ids[window.prefix :]
        read = (0, len(continuation) - 1)
        branches = [Branch(arm, continuation, read) for arm in arms]
        return Sequence(window.ids[: window.prefix], tuple(branches))

    def read(self, tile: Tile, number: int, sequence: Sequence, logits: list[Tensor]) -> None:
        """Score one window: `logits` [scored, V] per branch, the exact baseline first.

        The numbers stay on the device until `settle`: a copy per window would hold it up.
        """
        index = tile.first + number
        window = self.windows[index]
        target = torch.tensor(window.ids[window.prefix + 1 :], device=logits[0].device)
        self._scored.append((index, self.score(logits, target)))

    def forget(self) -> None:
        """Drop what was read and not settled."""
        self._scored.clear()

    def settle(self) -> None:
        """Bring the numbers of all windows read so far to the host, in one copy."""
        if not self._scored:
            return
        table = torch.cat([scores for _, scores in self._scored]).cpu().double().numpy()
        first = 0
        for index, scores in self._scored:
            rows, first = table[first : first + len(scores)], first + len(scores)
            baseline = self.nll["exact"][index] = rows[0, :, 0].mean()
            for name, row in zip(self._arm_names, rows[1:], strict=False):
                self.nll[name][index] = row[:, 0].mean()
                self.kl[name][index] = row[:, 1]
                self.agree[name][index] = row[:, 2].mean()
            for (name, _), row in zip(self.controls, rows[1 + len(self.arms) :], strict=False):
                self.control_delta[name][index] = row[:, 0].mean() - baseline
                self.control_kl[name][index] = row[:, 1]
        self._scored.clear()

    def numbers(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """All that was measured of windows [first, first + count), by name."""
        return {
            f"windows/{first}/{kind}/{arm}": table[first : first + count]
            for kind, tables in self._tables().items()
            for arm, table in tables.items()
        }

    def restore(self, first: int, count: int, numbers: Mapping[str, NDArray[Any]]) -> None:
        """Put back what `numbers` gave. Raises KeyError or ValueError where it does not fit."""
        given = {name: numbers[name] for name in self.numbers(first, count)}
        for name, wanted in self.numbers(first, count).items():
            if (found := given[name]).shape != wanted.shape or found.dtype != wanted.dtype:
                raise ValueError(f"{name}: found {found.dtype} {found.shape}")
        for name, wanted in self.numbers(first, count).items():
            wanted[...] = given[name]

    def _tables(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Everything measured: [windows] or [windows, scored]; controls have the first few."""
        return {
            "nll": self.nll,
            "kl": self.kl,
            "agree": self.agree,
            "control_delta": self.control_delta,
            "control_kl": self.control_kl,
        }

    def measurements(
        self,
        bits: dict[str, float | None],
        nonfinite: set[str],
        seed: int,
        device: torch.device,
    ) -> PerplexityMeasurements:
        """Everything measured, for `summarize_perplexity`. `nonfinite` names dropped arms."""
        infos = [WindowInfo(w.index, w.article, w.tokens_sha) for w in self.windows]
        return PerplexityMeasurements(
            windows=infos,
            arms=[arm_info(arm, device) for arm in self.arms],
            nll=self.nll,
            kl=self.kl,
            top1={name: float(share.mean()) for name, share in self.agree.items()},
            bits_per_element=bits,
            controls={
                name: ControlMeasurement(self.control_delta[name], self.control_kl[name])
                for name, _ in self.controls
            },
            status={n: "nonfinite" if n in nonfinite else "ok" for n in self._arm_names},
            seed=seed,
        )
