"""The study on two devices, measured in turn with one."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_study

from layersweep.bench.devices import Place, _rows, bench_devices
from layersweep.tasks.settings import EvalSettings

SMALL = EvalSettings(kv="fp8", tasks=("ppl",), segments=40, prefix=32, continuation=16)


def test_one_and_two_processes_in_turn_give_the_same_numbers() -> None:
    said: list[str] = []
    place = Place(str(tiny_study.model_folder()), "4GiB", "auto", None)
    one, two = bench_devices(place, ["cpu", "cpu"], SMALL, said.append, pairs=1)
    assert said == ["warm-up", "ppl: pair 1 of 1"]
    assert (one["job"], one["devices"], two["job"], two["devices"]) == (
        "ppl on 1",
        1,
        "ppl on 2",
        2,
    )
    assert two["same_numbers"] is True
    assert len(one["walls_s"]) == len(two["walls_s"]) == len(two["speedups"]) == 1
    assert two["speedup"] == pytest.approx(one["wall_s"] / two["wall_s"])
    # each process reads all weights
    assert two["weight_bytes_read"] == 2 * one["weight_bytes_read"] > 0
    assert two["tokens"] == one["tokens"] and len(two["wall_s_of_each"]) == 2


def test_rows_are_of_the_median_run_and_ratios_of_pairs() -> None:
    def run(wall: float, loss: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"perplexity": loss, "needle": None}, {"wall_s": wall}

    pairs = [(run(11.0), run(5.0)), (run(10.0), run(6.0)), (run(12.0), run(8.0))]
    one, two = _rows(pairs)
    assert (one["wall_s"], one["walls_s"]) == (11.0, [11.0, 10.0, 12.0])
    assert (two["wall_s"], two["walls_s"]) == (6.0, [5.0, 6.0, 8.0])
    assert two["speedups"] == [11 / 5, 10 / 6, 12 / 8] and two["speedup"] == 10 / 6
    assert two["same_numbers"] is True
    pairs[2] = run(12.0), run(8.0, loss=1.001)
    assert _rows(pairs)[1]["same_numbers"] is False


def test_a_process_that_fails_ends_the_measurement(capfd: pytest.CaptureFixture[str]) -> None:
    place = Place("/no/such/model", "4GiB", "auto", None)
    with pytest.raises(SystemExit, match="a process failed: see above"):
        bench_devices(place, ["cpu"], SMALL, lambda line: None)
    assert "/no/such/model" in capfd.readouterr().err
