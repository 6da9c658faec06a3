"""Just enough SVG for the report's figures. Colours come from CSS classes: light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

WIDTH = 760
NAME = 26  # characters of an arm's name before it is cut


@dataclass(frozen=True)
class Scale:
    """Maps values low..high to pixels start..end (end may lie above start: SVG's y grows down)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def drawing(width: int, height: int, label: str, marks: Iterable[str]) -> str:
    """One inline SVG with an accessible name."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'style="min-width:{min(width, 560)}px">{"".join(marks)}</svg>'
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def rect(x: float, y: float, width: float, height: float, style: str, *, opacity: float = 1) -> str:
    fade = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
        f'class="{style}"{fade}/>'
    )


def dot(x: float, y: float, radius: float, style: str, *, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{style}">{tip}</circle>'


def text(x: float, y: float, words: str, style: str = "", *, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">'
        f"{escape(words)}</text>"
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values inside low..high, steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_label(value: float, steps: list[float]) -> str:
    """As many decimals as the distance between two ticks needs."""
    step = abs(steps[1] - steps[0]) if len(steps) > 1 else abs(value) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def padded(values: Iterable[float], *, share: float = 0.08) -> tuple[float, float]:
    """The range of `values` with a margin; never empty."""
    known = list(values)
    low, high = min(known), max(known)
    margin = (high - low) * share or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin


def clip(label: str) -> str:
    return label if len(label) <= NAME else f"{label[: NAME - 1]}\u2026"


def name_width(names: list[str]) -> int:
    """Pixels for right-aligned labels: SVG cannot measure text, 7.6 px per character holds all."""
    return 18 + round(7.6 * max(len(name) for name in names))
