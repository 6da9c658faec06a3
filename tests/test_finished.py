"""The file of a finished sweep: what is written is read back, and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from layersweep.runs.finished import DamagedSweep, FinishedSweep, pack, unpack
from layersweep.runs.record import Record, TileKey
from layersweep.tasks.task import Stored


@dataclass
class Verdicts:
    """Numbers of a task that is here alone: two losses and a verdict for a tile of two items."""

    restored: list[Stored] = field(default_factory=list)

    def stored(self, first: int, count: int) -> Stored:
        return Stored({"nll": np.array([0.5, 2.25])}, [{"correct": True, "answer": "1234567"}])

    def restore(self, first: int, count: int, stored: Stored) -> None:
        self.restored.append(stored)


TILE = TileKey("verdicts", 0, 2)
SWEEP = FinishedSweep(
    [TILE],
    {("verdicts", "trellis:K3V2"): [1056.0, 400.0]},
    {"trellis:K3V2": 3},
    {"passed": True, "checks": [{"name": "copy gain", "value": 1.5}]},
)


def record() -> Record:
    return Record([TILE], 0, {"verdicts": Verdicts()})  # type: ignore[dict-item]


def test_a_sweep_is_read_back_as_it_was_written() -> None:
    fresh = record()
    assert unpack(fresh, pack(record(), SWEEP)) == SWEEP
    (stored,) = fresh.numbers["verdicts"].restored  # type: ignore[attr-defined]
    assert stored.arrays["nll"].tolist() == [0.5, 2.25]
    assert stored.rows == [{"correct": True, "answer": "1234567"}]


def test_a_damaged_byte_is_noticed_wherever_it_is() -> None:
    """In the losses, verdicts, cache bits, the gate's report, names, the hash itself."""
    data = pack(record(), SWEEP)
    assert 400 < len(data) < 2000
    for at in range(len(data)):
        for damage in (1, 0x20, 0x80):
            damaged = data[:at] + bytes([data[at] ^ damage]) + data[at + 1 :]
            with pytest.raises(DamagedSweep):
                unpack(record(), damaged)
