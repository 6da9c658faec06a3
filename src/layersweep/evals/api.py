"""`layersweep.evaluate`: an evaluation from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layersweep.evals.results import build_results
from layersweep.evals.settings import EvalSettings
from layersweep.evals.study import prepare_study, run_study
from layersweep.sweep.model import Model

Results = dict[str, Any]


def evaluate(
    model: Model, kv: Sequence[str] = ("K3V2", "K4V2"), settings: EvalSettings | None = None
) -> Results:
    """Run `settings` (the defaults of `layersweep eval` if None) with the arms `kv`.

    Returns the object that results.json holds. Raises InputError before weights are read,
    GateError when the model does not work.
    """
    from dataclasses import replace

    asked = replace(settings or EvalSettings(), kv=",".join(kv))
    study = prepare_study(model, asked)
    outcome = run_study(study)
    return build_results(study, outcome, status="complete", command="layersweep.evaluate")
