"""What a needle study measured, before any statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrialInfo:
    """One needle: where it was meant to lie, where it lies, and what was asked. The haystack is
    the text's characters [haystack_begin, haystack_end)."""

    id: str
    context: int
    depth: float
    achieved_depth: float
    key: str
    answer: str
    haystack_begin: int
    haystack_end: int


@dataclass(frozen=True)
class NeedleMeasurements:
    """`arms` names every arm with "exact" first; the mappings hold one entry per trial.

    answer_tokens: number of answer tokens per trial. answer_nll: mean NLL per answer token, nats,
    None where it was not measured (mode "generate") or is not finite. seed: of flips that are
    drawn.
    """

    trials: Sequence[TrialInfo]
    arms: Sequence[str]
    mode: str
    contexts: Sequence[int]
    keys: int
    answer_tokens: Sequence[int]
    outputs: Mapping[str, Sequence[str]]
    correct: Mapping[str, Sequence[bool]]
    answer_nll: Mapping[str, Sequence[float | None]]
    seed: int
