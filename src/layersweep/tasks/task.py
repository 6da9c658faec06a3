"""What a task is: something measured on sweeps, and what is made of its numbers.

    settings, text, arms --prepare--> Task --tiles--> sweep --read, settle--> Numbers
    Numbers --stored--> a sweep's file --restore--> Numbers --summarize--> a section of results.json

The first line needs torch and a model. The second needs neither, so that any machine can merge.
A new task is a folder here and an entry in tasks/registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from layersweep.tasks.settings import EvalSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from layersweep.families.spec import Decoder
    from layersweep.kv.arms import Arm
    from layersweep.model.compute import Compute
    from layersweep.sweep.record import LogitsReader, Pieces
    from layersweep.sweep.sequences import BranchedSequence, Tile
    from layersweep.text.encoding import EncodedText

    RunTiles = Callable[[list[Tile], LogitsReader], None]

Json = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """Numbers of consecutive items as a file keeps them: arrays by name, and a JSON row each."""

    arrays: Mapping[str, NDArray[Any]]
    rows: list[Json]


class Numbers(Protocol):
    """What a task measured, item by item (a window, a needle). `first`, `count`: which items."""

    def facts(self) -> Json:
        """What the numbers are of, as JSON; the registry makes empty numbers from it."""

    def stored(self, first: int, count: int) -> Stored: ...

    def restore(self, first: int, count: int, stored: Stored) -> None:
        """Put back what `stored` gave. Raises KeyError, IndexError or ValueError if it does not
        fit."""

    def lines(self, first: int, count: int) -> list[Json]:
        """What people read while the run is under way: a line per item."""

    def summarize(self, bits: Mapping[str, float | None], nonfinite: set[str], seed: int) -> Json:
        """The task's section of results.json. `bits`: measured per element, by arm; `nonfinite`:
        arms that a sweep dropped; `seed`: of resampling."""

    @property
    def arm_names(self) -> list[str]:
        """Arms besides the baseline."""


@dataclass(frozen=True)
class Source:
    """What tasks are made of, once per study."""

    settings: EvalSettings
    encoded: EncodedText
    arms: list[Arm]
    decoder: Decoder
    compute: Compute


class Task(Protocol):
    """A task under way. Its tiles carry `name`; the exact baseline is the first branch."""

    name: ClassVar[str]

    @classmethod
    def prepare(cls, source: Source) -> Self:
        """Raises InputError for settings that the text or the model cannot meet."""

    @classmethod
    def placeholders(cls, settings: EvalSettings, arms: Sequence[Arm]) -> list[Tile]:
        """Tiles as `prepare` would give them, every token 0: for plans without a text."""

    @classmethod
    def longest(cls, settings: EvalSettings) -> int:
        """Tokens of the longest sequence."""

    @property
    def numbers(self) -> Numbers: ...

    @property
    def generated(self) -> bool:
        """Whether answers are generated, in walks of their own (`GeneratedTask`)."""

    def tiles(self) -> list[Tile]: ...

    def read(self, tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        """Take what counts from the logits of one sequence; it may stay on the device."""

    def settle(self) -> None:
        """Bring what was read to `numbers`."""

    def forget(self) -> None:
        """Drop what was read and not settled."""

    def check_baseline(self, first: int, count: int) -> None:
        """Raises GateError where the exact baseline of settled items is not finite."""

    def protocol(self) -> Json:
        """Its part of the `protocol` section."""


class GeneratedTask(Task, Protocol):
    """A task whose answers are generated greedily, a walk over the weights per token."""

    new_tokens: ClassVar[int]

    def generate(self, run: RunTiles, first: Sequence[Sequence[Tile]]) -> None:
        """Generate for all tiles in `first`. `run` sweeps some tiles and keeps their caches: each
        list of tiles is read once, then all of them advance together, a token per sweep."""
