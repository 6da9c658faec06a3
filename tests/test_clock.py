"""The clock of a sweep's phases."""

from __future__ import annotations

import time

import pytest
import torch

from layersweep.sweep.clock import PhaseClock
from layersweep.sweep.turn import HostTurn


def test_a_phase_within_another_has_its_time_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = PhaseClock(torch.device("cpu"))

    def passes(seconds: float) -> None:
        now[0] += seconds

    passes(100.0)
    with clock.phase("experts"):
        passes(1.0)
        for _ in range(2):
            with clock.phase("gate"):
                passes(10.0)
            passes(2.0)
    passes(1000.0)  # belongs to none
    with clock.phase("experts"):
        passes(0.5)
    assert clock.seconds() == {"experts": 5.5, "gate": 20.0}


def test_a_turn_counts_the_time_that_it_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    turn = HostTurn()
    for spent in (1.0, 2.0):
        with turn:
            now[0] += spent
            with turn.away():
                now[0] += 100.0
            now[0] += 0.5
        now[0] += 1000.0
    assert turn.held_s == 4.0
