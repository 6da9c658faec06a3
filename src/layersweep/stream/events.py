"""Marks on a GPU's streams: points in its own time, recorded without waiting for it."""

from __future__ import annotations

import torch


def mark(device: torch.device, *, timed: bool = True) -> torch.cuda.Event:
    """An event that happens when the current stream gets here."""
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """Device seconds between the events of each pair, summed. They must have happened."""
    return float(sum(begun.elapsed_time(ended) for begun, ended in pairs)) / 1000
