"""Sizes as people type them, sizes and durations as they read them."""

from __future__ import annotations

import re

from layersweep.errors import InputError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_PART = r"([0-9]+(?:\.[0-9]+)?)"
_DURATION = re.compile(rf"(?:{_PART}h)?(?:{_PART}m)?(?:{_PART}s?)?")
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, *, option: str = "size") -> int:
    """Bytes of "14GiB", "500MB" or "4096". GiB is 2^30, GB is 10^9.

    Raises InputError when `text` is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InputError(
            f"{option}: found '{text}', needed a size",
            hint="write a number and a unit, for example 14GiB or 500MB",
        )
    number, unit = float(match[1]), match[2].lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    return int(number * base ** _POWER[unit.removesuffix("i")])


def parse_duration(text: str, *, option: str = "duration") -> float:
    """Seconds of "11h", "90m", "3600s", "1h30m" or "45".

    Raises InputError when `text` is no time above 0.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    parts = match.groups(default="0") if match else ("0", "0", "0")
    seconds = sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    if seconds <= 0:
        raise InputError(
            f"{option}: found '{text}', needed a time above 0",
            hint="write a number and a unit, for example 11h, 90m or 1h30m",
        )
    return seconds


def format_bytes(count: float) -> str:
    """Bytes in binary units: 15032385536 -> "14.00 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def format_seconds(seconds: float) -> str:
    """ "7.2 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
