"""What a perplexity study measured, before any statistics: plain arrays with their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layersweep.tasks.arms import ArmInfo, KvBytes


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
    whose argmax equals the baseline's. bits_per_element: None where a codec cannot say. kv_bytes:
    of the baseline and every arm, None where nobody can say. controls: "exact" and
    "identity:<method>". status: "ok" or "nonfinite" for every arm.
    """

    windows: Sequence[WindowInfo]
    arms: Sequence[ArmInfo]
    nll: Mapping[str, NDArray[np.float64]]
    kl: Mapping[str, NDArray[np.float32]]
    top1: Mapping[str, float]
    bits_per_element: Mapping[str, float | None]
    kv_bytes: Mapping[str, KvBytes | None]
    controls: Mapping[str, ControlMeasurement]
    status: Mapping[str, str]
    seed: int
