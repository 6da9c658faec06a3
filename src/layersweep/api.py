"""The Python API: `layersweep.load` and `layersweep.evaluate`, in a script or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

from rich.console import Console

from layersweep.notebook import NotebookProgress, in_notebook, tell, tell_fallback
from layersweep.progress import SweepProgress
from layersweep.report.results import Results
from layersweep.study.results import build_results
from layersweep.study.run import StudyRun
from layersweep.study.study import prepare_study
from layersweep.sweep import model as engine
from layersweep.sweep.model import Model
from layersweep.sweep.record import Progress
from layersweep.tasks.settings import (
    DEPTHS,
    TASKS,
    EvalSettings,
    parse_counts,
    parse_depths,
    parse_segments,
    parse_tasks,
)
from layersweep.text.bos import BosMode


def load(
    source: str = "demo",
    *,
    revision: str | None = None,
    vram: str = "auto",
    ram: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "auto",
    router_dtype: str = "float32",
    assume_capability: str | None = None,
) -> Model:
    """Open a checkpoint: headers, config and budgets; no weights are read.

    `source`: a folder, a hub id, or "demo". Sizes as "14GiB". `assume_capability` ("7.5") takes
    the paths of an older GPU than the one at hand. Notes on the checkpoint and fallbacks are said
    in a notebook's cell; elsewhere they are warnings (`LayersweepWarning`). Raises CheckpointError,
    InputError or BudgetError, each with what was found and what was needed.
    """
    model = engine.load(
        source, revision=revision, vram=vram, ram=ram, device=device, dtype=dtype,
        weights=weights, router_dtype=router_dtype, assume_capability=assume_capability,
    )  # fmt: skip
    for note in model.checkpoint.notes:
        tell(f"note: {note}")
    for fallback in model.compute.fallbacks:
        tell_fallback(fallback)
    return replace(model, say=tell_fallback)


def evaluate(
    model: Model,
    kv: str | Sequence[str] = ("K3V2", "K4V2"),
    *,
    tasks: str | Sequence[str] = TASKS,
    text: str | None = None,
    segments: int | Literal["all"] | None = 80,
    prefix: int = 1024,
    continuation: int = 512,
    bos: BosMode = "auto",
    cache_mode: Literal["prefill", "streaming"] = "prefill",
    niah_contexts: int | Sequence[int] = (4096,),
    niah_depths: float | Sequence[float] = DEPTHS,
    niah_per_depth: int = 6,
    niah_keys: int = 1,
    niah_mode: Literal["teacher", "generate"] = "teacher",
    gate: Literal["first", "only", "off"] = "first",
    seed: int = 0,
    progress: bool | None = None,
) -> Results:
    """The evaluation of `layersweep eval`, with its options as arguments.

    Where it takes several, one will do for a list of one, and a string as the command line has it
    ("K3V2,K4V2"). `segments` "all" or None takes all windows of the text. `progress` None shows it
    in a notebook and on a terminal (stderr), True everywhere, False nowhere. Returns the object
    that results.json holds. Fallbacks are said as `load` says them. Raises InputError before
    weights are read, GateError when the model does not work.
    """
    settings = EvalSettings(
        kv=_typed(kv),
        tasks=parse_tasks(_typed(tasks)),
        text=text,
        segments=None if segments is None else parse_segments(_typed(segments)),
        prefix=prefix,
        continuation=continuation,
        bos=bos,
        cache_mode=cache_mode,
        niah_contexts=parse_counts("--niah-context", _typed(niah_contexts)),
        niah_depths=parse_depths(_typed(niah_depths)),
        niah_per_depth=niah_per_depth,
        niah_keys=niah_keys,
        niah_mode=niah_mode,
        gate=gate,
        seed=seed,
    )
    study = prepare_study(model, settings)
    for fallback in study.fallbacks:
        if fallback not in model.compute.fallbacks:  # `load` has told of these
            tell_fallback(fallback)
    with StudyRun(study, tell_fallback) as running, _shown(progress) as reporter:
        outcome = running.measure(progress=reporter)
        return Results(build_results(study, outcome, command="layersweep.evaluate"))


def _typed(given: object) -> str:
    """As the command line has it: "K3V2,K4V2" of a list of both, "4096" of 4096."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return str(given)
    return ",".join(map(str, given))


def _shown(progress: bool | None) -> AbstractContextManager[Progress]:
    """Where progress goes; nowhere is a context, too."""
    if progress is not False and in_notebook():
        return NotebookProgress()
    if progress or (progress is None and sys.stderr.isatty()):
        return SweepProgress(Console(stderr=True))
    return nullcontext(lambda phase, done, total: None)
