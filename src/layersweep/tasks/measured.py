"""What an evaluation measured, before any statistics: plain arrays with their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ArmInfo:
    """What an arm is. `arm` is the resolved name, `requested` what the user typed."""

    arm: str
    requested: str
    method: str
    key_bits: float | None
    value_bits: float | None
    codec_version: str
    simulated: bool
    encoder: str | None


@dataclass(frozen=True)
class WindowInfo:
    """One window: its position in the text, the heading it starts under, the hash of its tokens."""

    index: int
    article: str | None
    tokens_sha: str


@dataclass(frozen=True)
class ControlMeasurement:
    """A control on its few windows: delta [n_control] in nats, kl [n_control, scored] in nats."""

    delta: NDArray[np.float64]
    kl: NDArray[np.float32]


@dataclass(frozen=True)
class PerplexityMeasurements:
    """`arms` leaves out the baseline; `nll` (mean per window, [n_windows]) holds it as "exact".

    kl [n_windows, scored]: KL(exact || arm) per scored token, nats. top1: share of scored tokens
    whose argmax equals the baseline's. bits_per_element: None where a codec cannot say.
    controls: "exact" and "identity:<method>". status: "ok" or "nonfinite" for every arm.
    """

    windows: Sequence[WindowInfo]
    arms: Sequence[ArmInfo]
    nll: Mapping[str, NDArray[np.float64]]
    kl: Mapping[str, NDArray[np.float32]]
    top1: Mapping[str, float]
    bits_per_element: Mapping[str, float | None]
    controls: Mapping[str, ControlMeasurement]
    status: Mapping[str, str]
    seed: int


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
    None where it was not measured (mode "generate") or is not finite.
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
