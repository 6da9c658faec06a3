"""Where two manifests differ, in words."""

from __future__ import annotations

from typing import Any


def differences(found: Any, wanted: dict[str, Any]) -> list[str]:
    """What of the manifest `found` is not as `wanted`, in words."""
    if not isinstance(found, dict):
        return ["a manifest that is no JSON object"]
    names = [*wanted, *(name for name in found if name not in wanted)]
    return [
        f"{name} {_short(found.get(name))} there, {_short(wanted.get(name))} here"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
