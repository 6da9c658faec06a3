"""What a study measures, apart from what measures it.

A record is filled by the tasks of a study, or put together from files where there is neither model
nor text: `facts` says in JSON what its numbers are of, and `Record.of` takes that back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from layersweep.tasks.registry import TASKS
from layersweep.tasks.task import Numbers

Json = dict[str, Any]


@dataclass(frozen=True)
class TileKey:
    """A tile by its task, and by what it holds of it: items [first, first + count)."""

    task: str
    first: int
    count: int

    @property
    def words(self) -> str:
        """As people count: "perplexity 0 to 19"."""
        return f"{self.task} {self.first} to {self.first + self.count - 1}"


@dataclass
class Record:
    """The numbers of a study, by task. `tiles` are all of its tiles, `seed` that of resampling."""

    tiles: list[TileKey]
    seed: int
    numbers: Mapping[str, Numbers]

    def facts(self) -> Json:
        """What the numbers are of, as JSON; the numbers themselves are in files of sweeps."""
        return {
            "tiles": [asdict(tile) for tile in self.tiles],
            "seed": self.seed,
            "tasks": {name: numbers.facts() for name, numbers in self.numbers.items()},
        }

    @classmethod
    def of(cls, facts: Json) -> Record:
        """An empty record from `facts`. Raises KeyError or TypeError for anything else."""
        given = facts["tasks"]
        numbers = {
            kind.name: kind.numbers(given[kind.name]) for kind in TASKS if kind.name in given
        }
        return cls([TileKey(**tile) for tile in facts["tiles"]], facts["seed"], numbers)

    def lines(self, tile: TileKey) -> list[Json]:
        """What people read of a finished tile: a line per item."""
        return self.numbers[tile.task].lines(tile.first, tile.count)
