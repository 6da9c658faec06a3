"""`layersweep.evaluate`: an evaluation from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from layersweep.evals.results import build_results
from layersweep.evals.run import run_study
from layersweep.evals.settings import DEPTHS, TASKS, EvalSettings
from layersweep.evals.study import prepare_study
from layersweep.evals.windows import BosMode
from layersweep.sweep.model import Model

Results = dict[str, Any]


def evaluate(
    model: Model,
    kv: Sequence[str] = ("K3V2", "K4V2"),
    *,
    tasks: Sequence[str] = TASKS,
    text: str | None = None,
    segments: int | None = 80,
    prefix: int = 1024,
    continuation: int = 512,
    bos: BosMode = "auto",
    cache_mode: Literal["prefill", "streaming"] = "prefill",
    niah_contexts: Sequence[int] = (4096,),
    niah_depths: Sequence[float] = DEPTHS,
    niah_per_depth: int = 6,
    niah_keys: int = 1,
    niah_mode: Literal["teacher", "generate"] = "teacher",
    gate: Literal["first", "only", "off"] = "first",
    seed: int = 0,
) -> Results:
    """The evaluation of `layersweep eval`, with its options as arguments.

    `segments` None takes all windows of the text. Returns the object that results.json holds.
    Raises InputError before weights are read, GateError when the model does not work.
    """
    settings = EvalSettings(
        kv=",".join(kv),
        tasks=tuple(tasks),
        text=text,
        segments=segments,
        prefix=prefix,
        continuation=continuation,
        bos=bos,
        cache_mode=cache_mode,
        niah_contexts=tuple(niah_contexts),
        niah_depths=tuple(niah_depths),
        niah_per_depth=niah_per_depth,
        niah_keys=niah_keys,
        niah_mode=niah_mode,
        gate=gate,
        seed=seed,
    )
    study = prepare_study(model, settings)
    outcome = run_study(study)
    return build_results(study, outcome, command="layersweep.evaluate")
