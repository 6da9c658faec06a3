"""Numbers for JSON, which has neither NaN nor infinity."""

from __future__ import annotations

import math


def finite(value: float | None) -> float | None:
    """The number as a float; None where it is not finite, or was not measured."""
    return float(value) if value is not None and math.isfinite(value) else None
