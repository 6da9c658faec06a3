"""The tasks of a study, by what they are."""

from __future__ import annotations

from layersweep.study.study import Study
from layersweep.tasks.needle.task import NeedleTask
from layersweep.tasks.perplexity.task import PerplexityTask


def perplexity_of(study: Study) -> PerplexityTask:
    (task,) = [task for task in study.tasks if isinstance(task, PerplexityTask)]
    return task


def needle_of(study: Study) -> NeedleTask:
    (task,) = [task for task in study.tasks if isinstance(task, NeedleTask)]
    return task
