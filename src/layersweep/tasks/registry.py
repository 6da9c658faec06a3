"""Every task that `--tasks` knows. Loads no torch: a task is imported when it is prepared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from layersweep.tasks.needle.numbers import NeedleNumbers
from layersweep.tasks.perplexity.numbers import PerplexityNumbers
from layersweep.tasks.settings import EvalSettings
from layersweep.tasks.task import Json, Numbers, Task


@dataclass(frozen=True)
class TaskKind:
    """One task, as everybody else sees it.

    name          of its section in results.json, and of its tiles
    option        its word in --tasks
    items         what it counts, in the plural
    lines         the file that grows by a line per item
    protocol      its keys in the protocol section, null where it was not asked for
    numbers       empty numbers from their facts
    computed_by   "module:name" of its `Task`
    judged_by     "module:name" of what a section lacks to be published
    generates     whether answers are generated
    """

    name: str
    option: str
    items: str
    lines: str
    protocol: tuple[str, ...]
    numbers: Callable[[Json], Numbers]
    computed_by: str
    judged_by: str
    generates: Callable[[EvalSettings], bool] = lambda settings: False

    @property
    def task(self) -> type[Task]:
        """Loads torch."""
        task: type[Task] = _named(self.computed_by)
        return task

    def missing(self, section: Json) -> list[str]:
        """What a section of results.json lacks to be published, in sentences; loads scipy."""
        found: list[str] = _named(self.judged_by)(section)
        return found


def _named(path: str):  # type: ignore[no-untyped-def]
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


TASKS = (
    TaskKind(
        name="perplexity",
        option="ppl",
        items="windows",
        lines="segments.jsonl",
        protocol=(
            *("segments", "prefix", "continuation", "scored_tokens", "windows"),
            *("exact_pair_fraction", "tile_segments"),
        ),
        numbers=PerplexityNumbers.of,
        computed_by="layersweep.tasks.perplexity.task:PerplexityTask",
        judged_by="layersweep.tasks.perplexity.summary:missing",
    ),
    TaskKind(
        name="needle",
        option="niah",
        items="needles",
        lines="needle.jsonl",
        protocol=("niah",),
        numbers=NeedleNumbers.of,
        computed_by="layersweep.tasks.needle.task:NeedleTask",
        judged_by="layersweep.tasks.needle.summary:missing",
        generates=lambda settings: settings.generates,
    ),
)
BY_NAME = {kind.name: kind for kind in TASKS}


def asked(settings: EvalSettings) -> list[TaskKind]:
    """The kinds that `settings` names, in the order in which they are computed."""
    return [kind for kind in TASKS if kind.option in settings.tasks]
