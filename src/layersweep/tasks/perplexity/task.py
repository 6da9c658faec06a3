"""Paired perplexity: every window is scored with the exact cache and with each arm's cache.

`prefill`: the prefix is computed once, exactly; each arm's branch scores the continuation
with the prefix read through its codec. `streaming`: every arm is a sequence of its own, in
which every read goes through the codec.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from layersweep.errors import GateError
from layersweep.kv.arms import EXACT, Arm, identity_arm
from layersweep.kv.methods import METHODS
from layersweep.model import maths
from layersweep.sweep.record import Pieces
from layersweep.sweep.sequences import Branch, BranchedSequence, Role, Tile, tiles_of
from layersweep.tasks.arms import ArmInfo, KvBytes
from layersweep.tasks.kv_bytes import kv_bytes
from layersweep.tasks.perplexity.measurements import WindowInfo
from layersweep.tasks.perplexity.numbers import CONTROL_WINDOWS, PerplexityNumbers
from layersweep.tasks.settings import EvalSettings
from layersweep.tasks.task import Json, Source
from layersweep.text.tokenizer import check_ids
from layersweep.text.windows import Window, cut_windows

TILE_SEGMENTS = 20


def control_arms(arms: Sequence[Arm]) -> dict[str, Arm]:
    """By their names in the noise floor: each method's identity, and the exact cache last.

    A method's arm with options comes before one without: they may add a transform. What
    transforms somebody's own codec has is not known: it gets none.
    """
    of: dict[str, Arm] = {}
    for arm in arms:
        if arm.method in METHODS and (arm.options or arm.method not in of):
            of[arm.method] = arm
    identities = {f"identity:{method}": identity_arm(arm) for method, arm in of.items()}
    return {**identities, EXACT.name: EXACT}


@dataclass
class PerplexityTask:
    """Windows under the arms, which leave out the baseline. `score` as `maths.score_branches`."""

    windows: list[Window]
    arms: list[Arm]
    streaming: bool
    device: torch.device
    score: Callable[[list[Tensor], Tensor], Tensor] = maths.score_branches
    kv_bytes: Mapping[str, KvBytes | None] = field(default_factory=dict)
    controls: dict[str, Arm] = field(init=False)
    numbers: PerplexityNumbers = field(init=False)
    _scored: list[tuple[int, BranchedSequence, Tensor]] = field(default_factory=list)

    name: ClassVar[str] = "perplexity"
    generated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.controls = control_arms(self.arms)
        self.numbers = PerplexityNumbers(
            windows=[WindowInfo(w.index, w.article, w.tokens_sha) for w in self.windows],
            arms=[ArmInfo.of(arm, self.device) for arm in self.arms],
            scored=len(self.windows[0].ids) - self.windows[0].prefix - 1,
            controls=list(self.controls),
            kv_bytes=dict(self.kv_bytes),
        )

    @classmethod
    def prepare(cls, source: Source) -> PerplexityTask:
        settings, decoder = source.settings, source.decoder
        windows = cut_windows(
            source.encoded, segments=settings.segments, prefix=settings.prefix,
            continuation=settings.continuation, bos=settings.bos,
        )  # fmt: skip
        for window in windows:
            check_ids(window.ids, decoder.vocab_size)
        compute = source.compute
        sizes = {arm.name: kv_bytes(arm, decoder, compute) for arm in (EXACT, *source.arms)}
        return cls(
            windows, source.arms, settings.streaming, compute.device, compute.ops.score_branches,
            sizes,
        )  # fmt: skip

    @classmethod
    def longest(cls, settings: EvalSettings) -> int:
        return settings.prefix + settings.continuation

    @classmethod
    def placeholders(cls, settings: EvalSettings, arms: Sequence[Arm]) -> list[Tile]:
        ids, own = (0,) * cls.longest(settings), [control_arms(arms), {}]
        first, later = (
            _ride(ids, settings.prefix, arms, controls, settings.streaming) for controls in own
        )
        count = settings.segments or 0
        held = min(CONTROL_WINDOWS, count)
        return tiles_of(cls.name, [first] * held + [later] * (count - held), TILE_SEGMENTS)

    def tiles(self) -> list[Tile]:
        windows = [
            _ride(
                window.ids, window.prefix, self.arms,
                self.controls if window.index < CONTROL_WINDOWS else {}, self.streaming,
            )
            for window in self.windows
        ]  # fmt: skip
        return tiles_of(self.name, windows, TILE_SEGMENTS)

    def read(self, tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        """Score one window: logits [positions, V] per branch, the exact baseline first.

        The numbers stay on the device until `settle`: a copy per window would hold it up.
        """
        index = tile.first + number
        window = self.windows[index]
        target = torch.tensor(window.ids[window.prefix + 1 :])
        target = target.to(self.device, non_blocking=True)  # does not wait for the last window
        scores = [self.score(logits, target[at]) for at, logits in pieces]
        self._scored.append((index, sequence, torch.cat(scores, dim=1)))

    def forget(self) -> None:
        self._scored.clear()

    def settle(self) -> None:
        """All windows read so far, in one copy."""
        if not self._scored:
            return
        table = torch.cat([scores for _, _, scores in self._scored]).cpu().double().numpy()
        control_of = {arm.name: name for name, arm in self.controls.items()}
        numbers, first, baseline = self.numbers, 0, math.nan
        for index, sequence, scores in self._scored:
            rows, first = table[first : first + len(scores)], first + len(scores)
            for branch, row in zip(sequence.branches, rows, strict=True):
                loss, arm = row[:, 0].mean(), branch.arm.name
                if branch.role == "control":
                    name = control_of[arm]
                    numbers.control_delta[name][index] = loss - baseline
                    numbers.control_kl[name][index] = row[:, 1]
                    continue
                numbers.nll[arm][index] = loss
                if branch.role == "baseline":  # comes first
                    baseline = loss
                else:
                    numbers.kl[arm][index] = row[:, 1]
                    numbers.agree[arm][index] = row[:, 2].mean()
        self._scored.clear()

    def check_baseline(self, first: int, count: int) -> None:
        """Hidden states can be finite and the head's logits not: the losses say so."""
        losses = self.numbers.nll[EXACT.name][first : first + count]
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise GateError(
                    f"perplexity {first + offset}: the exact baseline's loss is {loss}, "
                    "needed a finite number (its hidden states are finite, the head's logits not)",
                    hint="try --dtype bfloat16 or float32",
                )

    def protocol(self) -> Json:
        first = self.windows[0]
        continuation = len(first.ids) - first.prefix
        exact = 0.0 if self.streaming else exact_pair_fraction(first.prefix, continuation)
        return {
            "segments": len(self.windows),
            "prefix": first.prefix,
            "continuation": continuation,
            "scored_tokens": len(self.windows) * (continuation - 1),
            "windows": first.possible,
            "exact_pair_fraction": exact,
            "tile_segments": TILE_SEGMENTS,
        }


def _ride(
    ids: tuple[int, ...],
    prefix: int,
    arms: Sequence[Arm],
    controls: dict[str, Arm],
    streaming: bool,
) -> BranchedSequence:
    """A window's sequence: baseline, arms, and the controls of the first few windows."""
    roles: list[tuple[Role, Arm]] = [("baseline", EXACT), *(("arm", arm) for arm in arms)]
    roles += [("control", arm) for arm in controls.values()]
    own = ids if streaming else ids[prefix:]
    read = (prefix, len(ids) - 1) if streaming else (0, len(own) - 1)
    branches = (Branch(arm, own, read, streaming, role) for role, arm in roles)
    return BranchedSequence(() if streaming else ids[:prefix], tuple(branches))


def exact_pair_fraction(prefix: int, continuation: int) -> float:
    """Share of the (query, key) pairs of a scored continuation whose key is not quantized."""
    queries = continuation - 1
    own = queries * (queries + 1) // 2
    return own / (own + queries * prefix)
