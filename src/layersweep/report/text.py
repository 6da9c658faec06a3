"""Numbers as they are printed everywhere: one spelling for terminal, HTML, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "-"


def fixed(value: float | None, decimals: int) -> str:
    return MISSING if value is None else f"{value:.{decimals}f}"


def signed(value: float | None, decimals: int) -> str:
    """ "+0.37"; a value that rounds to zero has no sign."""
    if value is None:
        return MISSING
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text


def bits(value: float | None) -> str:
    """Measured bits per element; a question mark where nobody counted them."""
    return "?" if value is None else f"{value:.2f}"


def factor(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}x"


def kib(nbytes: float | None) -> str:
    """Three digits, or all that stand before the point."""
    if nbytes is None:
        return "?"
    size = nbytes / 1024
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"


def percent_of_nats(nats: float) -> float:
    return 100.0 * math.expm1(nats)


def interval_percent(bounds: Sequence[float] | None, decimals: int) -> str:
    """A 95 % interval given in nats, printed in percent: "[+0.30,+0.44]"."""
    if bounds is None:
        return MISSING
    low, high = (signed(percent_of_nats(bound), decimals) for bound in bounds)
    return f"[{low},{high}]"


def ratio(value: float | None, bounds: Sequence[float] | None) -> str:
    """A ratio is never printed without its 95 % interval: "0.47 [0.38,0.61]"."""
    if value is None or bounds is None:
        return MISSING
    return f"{value:.2f} [{bounds[0]:.2f},{bounds[1]:.2f}]"


def p_value(p: float | None, name: str = "p") -> str:
    if p is None:
        return f"{name} undefined"
    if p < 1e-6:
        return f"{name}<1e-6"
    return f"{name}={p:.2g}" if p < 0.1 else f"{name}={p:.2f}"


def significant(value: float | None) -> str:
    """Two significant digits."""
    return MISSING if value is None else f"{value:.2g}"


def two_digits(value: float | None) -> str:
    """Two significant digits without the leading zero: 0.0021 -> ".0021"."""
    if value is None:
        return MISSING
    text = f"{value:.2g}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def share_interval(bounds: Sequence[float] | None) -> str:
    """A Wilson interval in whole percent: "[91-100 %]"."""
    if bounds is None:
        return f"[{MISSING}]"
    low, high = bounds
    return f"[{math.floor(100 * low + 0.5)}-{math.floor(100 * high + 0.5)} %]"


def count_of(correct: int, n: int, bounds: Sequence[float] | None) -> str:
    """k/n is never printed without its interval."""
    return f"{correct}/{n} {share_interval(bounds)}"


def decimals_for(sems: Sequence[float | None]) -> int:
    """Decimals of a percent figure so that the smallest SEM (nats) still shows a digit; 2 to 5."""
    known = [sem for sem in sems if sem]
    if not known:
        return 2
    return min(5, max(2, math.ceil(-math.log10(100.0 * min(known)))))
