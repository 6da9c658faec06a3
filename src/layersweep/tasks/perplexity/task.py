"""Paired perplexity: every window is scored with the exact cache and with each arm's cache.

`prefill`: the prefix is computed once, exactly; each arm's branch scores the continuation
with the prefix read through its codec. `streaming`: every arm is a sequence of its own, in
which every read goes through the codec.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.kv.arms import EXACT, Arm, identity_arm
from layersweep.kv.methods import METHODS
from layersweep.model import maths
from layersweep.runs.record import CONTROL_WINDOWS, PERPLEXITY, PerplexityNumbers
from layersweep.sweep.sequences import Branch, Sequence, Tile, tiles_of
from layersweep.tasks.measured import ArmInfo, WindowInfo
from layersweep.text.windows import Window

TILE_SEGMENTS = 20


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
    device: torch.device
    score: Callable[[list[Tensor], Tensor], Tensor] = maths.score_branches
    controls: list[tuple[str, Arm]] = field(init=False)
    numbers: PerplexityNumbers = field(init=False)
    _scored: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.controls = control_arms(self.arms)
        self.numbers = PerplexityNumbers(
            windows=[WindowInfo(w.index, w.article, w.tokens_sha) for w in self.windows],
            arms=[arm_info(arm, self.device) for arm in self.arms],
            scored=len(self.windows[0].ids) - self.windows[0].prefix - 1,
            controls=[name for name, _ in self.controls],
        )

    def tiles(self) -> list[Tile]:
        return tiles_of(PERPLEXITY, [self._sequence(w) for w in self.windows], TILE_SEGMENTS)

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
        numbers, first = self.numbers, 0
        for index, scores in self._scored:
            rows, first = table[first : first + len(scores)], first + len(scores)
            baseline = numbers.nll[EXACT.name][index] = rows[0, :, 0].mean()
            for arm, row in zip(self.arms, rows[1:], strict=False):
                numbers.nll[arm.name][index] = row[:, 0].mean()
                numbers.kl[arm.name][index] = row[:, 1]
                numbers.agree[arm.name][index] = row[:, 2].mean()
            for (name, _), row in zip(self.controls, rows[1 + len(self.arms) :], strict=False):
                numbers.control_delta[name][index] = row[:, 0].mean() - baseline
                numbers.control_kl[name][index] = row[:, 1]
        self._scored.clear()
