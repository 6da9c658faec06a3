"""Where two manifests differ, in words."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

SHOWN, BEFORE = 40, 8  # characters of a value, and of what both values begin with


def differences(found: Any, wanted: dict[str, Any]) -> list[str]:
    """What of the manifest `found` is not as `wanted`, in words."""
    if not isinstance(found, dict):
        return ["a manifest that is no JSON object"]
    names = [*wanted, *(name for name in found if name not in wanted)]
    return [
        f"{name} {_short(there, here)} there, {_short(here, there)} here"
        for name in names
        if (there := found.get(name)) != (here := wanted.get(name))
    ]


def _short(value: Any, other: Any) -> str:
    """`value` as text, cut to where it begins to differ from `other`."""
    text, against = str(value), str(other)
    if len(text) <= SHOWN:
        return text
    same = takewhile(lambda pair: pair[0] == pair[1], zip(text, against, strict=False))
    start = max(0, min(sum(1 for _ in same) - BEFORE, len(text) - SHOWN))
    cut = text[start : start + SHOWN]
    return f"{'...' if start else ''}{cut}{'...' if start + SHOWN < len(text) else ''}"
