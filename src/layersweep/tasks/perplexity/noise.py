"""What the controls say: how large a difference is that no quantization made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from layersweep.tasks.arms import BASELINE
from layersweep.tasks.perplexity.measurements import ControlMeasurement

Json = dict[str, Any]


def noise_floor(controls: Mapping[str, ControlMeasurement]) -> Json:
    """`identity` is the control with the largest rms; each method's own is in by_method."""
    by_method = {
        name.removeprefix("identity:"): noise(control)
        for name, control in controls.items()
        if name.startswith("identity:")
    }
    exact = controls.get(BASELINE)
    return {"exact": None if exact is None else noise(exact), "identity": largest(by_method)}


def noise(control: ControlMeasurement) -> Json:
    """rms = sqrt(mean(delta^2)) over the control's windows: a mean of a few would cancel. Every
    figure is null where the control gave a value that is not finite."""
    delta = np.asarray(control.delta, dtype=np.float64)
    figures = {
        "mean": float(delta.mean()),
        "sd": float(delta.std(ddof=1)) if len(delta) > 1 else None,
        "max": float(np.abs(delta).max()),
        "rms": math.sqrt(float((delta**2).mean())),
        "kl": float(np.asarray(control.kl, dtype=np.float64).mean()),
    }
    known = all(value is None or math.isfinite(value) for value in figures.values())
    return {"n": len(delta)} | (figures if known else dict.fromkeys(figures))


def largest(by_method: Mapping[str, Json]) -> Json | None:
    """The control with the largest rms, beside all of them; None where none was run."""
    worst = max(by_method.values(), key=lambda one: -1.0 if one["rms"] is None else one["rms"],
                default=None)  # fmt: skip
    return None if worst is None else worst | {"by_method": dict(by_method)}


def below_noise_floor(mean: float, method: str, floor: Json) -> bool | None:
    """|mean delta| < 2 rms of the method's own transforms; None where those are not known."""
    own = (floor["identity"] or {"by_method": {}})["by_method"].get(method)
    return None if own is None or own["rms"] is None else abs(mean) < 2.0 * own["rms"]
