"""The study on two devices, measured in turn with one."""

from __future__ import annotations

import pytest

from layersweep.bench.devices import Place, bench_devices
from layersweep.evals.settings import EvalSettings

SMALL = EvalSettings(tasks=("ppl",), segments=40, prefix=32, continuation=16)


def test_one_and_two_processes_in_turn_give_the_same_numbers() -> None:
    said: list[str] = []
    place = Place("demo", "4GiB", "auto", None)
    one, two = bench_devices(place, ["cpu", "cpu"], SMALL, said.append, pairs=2)
    assert said == ["warm-up", "ppl: pair 1 of 2", "ppl: pair 2 of 2"]
    assert (one["job"], one["devices"], two["job"], two["devices"]) == (
        "ppl on 1",
        1,
        "ppl on 2",
        2,
    )
    assert two["same_numbers"] is True
    assert len(one["walls_s"]) == len(two["walls_s"]) == len(two["speedups"]) == 2
    assert one["wall_s"] == max(one["walls_s"]) and two["wall_s"] == max(two["walls_s"])
    for speedup, alone, together in zip(
        two["speedups"], one["walls_s"], two["walls_s"], strict=True
    ):
        assert speedup == pytest.approx(alone / together)
    assert two["speedup"] == pytest.approx(sum(two["speedups"]) / 2)
    # each process reads all weights
    assert two["weight_bytes_read"] == 2 * one["weight_bytes_read"] > 0
    assert two["tokens"] == one["tokens"] and len(two["wall_s_of_each"]) == 2


def test_a_process_that_fails_ends_the_measurement(capfd: pytest.CaptureFixture[str]) -> None:
    place = Place("demo", "4GiB", "1MiB", None)
    with pytest.raises(SystemExit, match="a process failed: see above"):
        bench_devices(place, ["cpu", "cpu"], SMALL, lambda line: None)
    assert "--ram: available" in capfd.readouterr().err
