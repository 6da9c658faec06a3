"""lm-eval's tasks under every arm of a harness: lm-eval's results for each arm, and ours of all.

lm-eval's evaluation asks one model for all requests of a kind at once. It runs once per arm: the
first arm's questions are computed for all arms, and the others are answered from what is there.
"""

from __future__ import annotations

import difflib
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from layersweep.checkpoint.connection import INVALID_URL, TRANSPORT_ERROR
from layersweep.environment import device_facts, package_version, versions
from layersweep.errors import InputError, MachineError
from layersweep.integrations.lm_eval.compare import (
    ANSWER_NLL,
    answer_nll,
    differences,
    metrics_of,
)
from layersweep.integrations.lm_eval.generation import sampling_of
from layersweep.integrations.lm_eval.harness import Harness
from layersweep.integrations.lm_eval.lm import LayersweepLM
from layersweep.integrations.lm_eval.scoring import HarnessArm
from layersweep.runs.files import write_atomically, writing
from layersweep.runs.sections import now
from layersweep.study.results import model_section
from layersweep.tasks.finite import finite

Json = dict[str, Any]
SCHEMA = "layersweep.lm_eval/1"
FILE = "lm_eval.json"


@dataclass(frozen=True)
class Asked:
    """What lm-eval is asked for; names and meanings are those of its own options. `limit`:
    documents of each task, or a share of them below 1."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False


def load_tasks(asked: Asked, source: str) -> list[Task | Group]:
    """The tasks and groups by name or pattern, with their documents. Raises InputError for a name
    that nothing has, and for what cannot be loaded or run here."""
    if not asked.tasks:
        raise InputError("--tasks: found no name, needed one or more", hint="--tasks arc_easy")
    manager = _manager(asked, source)
    found: list[Task | Group] = []
    for name in asked.tasks:
        matching = manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
            raise InputError(
                f"--tasks: found '{name}', needed a task, group or tag of lm-eval, or of "
                "--include-path",
                hint=f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them",
            )
        for one in matching:
            with _loading(one):
                loaded = manager.load([one])
            groups = loaded.get("groups", {})
            found += [groups[one]] if one in groups else loaded["tasks"].values()
            for task in loaded["tasks"].values():
                _check(task)
    try:
        manager.load(found)
    except ValueError as error:
        raise InputError(
            f"--tasks: found a task twice ({error}), needed each once", hint="leave one out"
        ) from error
    return found


def _manager(asked: Asked, source: str) -> TaskManager:
    """lm-eval's own tasks take seconds to list, and are left out where nobody asks for them."""
    metadata = {"pretrained": source}
    if asked.include_path is not None:
        if not asked.include_path.is_dir():
            raise InputError(
                f"--include-path {asked.include_path}: found no folder, needed one with the YAML "
                "files of tasks",
                hint="name the folder that holds them",
            )
        path = str(asked.include_path)
        own = TaskManager(include_path=path, include_defaults=False, metadata=metadata)
        if set(asked.tasks) <= set(own.all_subtasks):
            return own
        return TaskManager(include_path=path, metadata=metadata)
    return TaskManager(metadata=metadata)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What lm-eval and datasets raise for a task, as an InputError."""
    try:
        yield
    except (ImportError, KeyError, ValueError, OSError, TRANSPORT_ERROR, INVALID_URL) as error:
        why = " ".join(str(error).split())[:300]
        missing = isinstance(error, ImportError)
        raise InputError(
            f"--tasks: found a task {name} that cannot be loaded ({type(error).__name__}: {why}), "
            f"needed {'the packages that it imports' if missing else 'its definition and data'}",
            hint="pip install what is missing"
            if missing
            else "see the task's YAML file, or load its data set once where there is a network",
        ) from error


def _check(task: Task) -> None:
    """Tasks that only lm-eval's own command should run, or that no model here can answer."""
    for sign, what in (("UNSAFE_CODE", "runs code that a model wrote"),
                       ("MULTIMODAL", "shows images or sound")):  # fmt: skip
        if getattr(task, sign, False):
            raise InputError(
                f"--tasks: found {task.task_name}, which {what}, needed text alone",
                hint="leave it out",
            )


def evaluate(
    harness: Harness, tasks: Sequence[Task | Group], asked: Asked, *, command: str,
    out: Path | None = None,
) -> Json:  # fmt: skip
    """Our own results. lm-eval runs once for each arm; the first run, of the exact cache, computes
    all arms.

    What lm-eval prints, it prints for every arm: it is shown once, on stderr. An arm that is not
    finite has no results. Raises InputError for a chat template that is not there and for answers
    that cannot be generated, before weights are read; what Harness.scores and Harness.answers
    raise; and MachineError where `out` cannot be written.
    """
    if asked.apply_chat_template and harness.tokenizer.chat_template is None:
        raise InputError(
            "--apply-chat-template: found no chat template in the tokenizer's files, needed one",
            hint="leave it out: the model may not be one to chat with",
        )
    for task in _leaf_tasks(tasks):
        if task.OUTPUT_TYPE == "generate_until":
            kwargs = task.get_config("generation_kwargs") or {}
            harness.check_answers(task.task_name, sampling_of(kwargs, None))
    began = time.perf_counter()
    found: dict[str, Json] = {}
    for arm in harness.arms:
        if arm in harness.ill:
            continue
        said = io.StringIO() if found else sys.stderr
        with redirect_stdout(said), redirect_stderr(said):
            found[arm.name] = _run(harness, arm, tasks, asked, out)
    results = _results(harness, found, asked, command, time.perf_counter() - began)
    if out is not None:
        with writing(out, "run it again"):
            write_atomically(out / FILE, json.dumps(results, indent=1, allow_nan=False))
    return results


def _leaf_tasks(tasks: Sequence[Task | Group]) -> Iterator[Task]:
    for one in tasks:
        yield from one.get_all_tasks() if isinstance(one, Group) else [one]


def _run(
    harness: Harness, arm: HarnessArm, tasks: Sequence[Task | Group], asked: Asked,
    out: Path | None,
) -> Json:  # fmt: skip
    """lm-eval's results of one arm, with a sample for each document, also in a folder of `out`."""
    source = harness.model.checkpoint.source
    tracker = EvaluationTracker(output_path=None if out is None else str(out / folder_of(arm)))
    results: Json | None = simple_evaluate(
        LayersweepLM(harness, arm),
        model_args={"pretrained": source, "kv": arm.name},
        tasks=list(tasks),
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        apply_chat_template=asked.apply_chat_template,
        evaluation_tracker=tracker,
        task_manager=TaskManager(include_defaults=False),
    )
    assert results is not None, "one process has them all"
    if out is not None:
        _save(results, tracker, out / folder_of(arm))
    return results


def folder_of(arm: HarnessArm) -> str:
    """A folder's name for an arm: trellis_K3V2@fit=1."""
    return "".join(char if char.isalnum() or char in "@=.-" else "_" for char in arm.name)


def _save(results: Json, tracker: EvaluationTracker, folder: Path) -> None:
    """By lm-eval's own writer, which only logs a failure."""
    samples = results["samples"]
    before = set(folder.rglob("*.json*"))
    whole = {name: value for name, value in results.items() if name != "samples"}
    tracker.save_results_aggregated(results=whole, samples=samples)
    for name, its in samples.items():
        tracker.save_results_samples(task_name=name, samples=[dict(one) for one in its])
    written = set(folder.rglob("*.json*")) - before
    if len(written) != 1 + len(samples):
        raise MachineError(
            f"{folder}: found {len(written)} new files, needed {1 + len(samples)}: lm-eval could "
            "not write its results",
            hint="make room, or name another --out",
        )


def _results(
    harness: Harness, found: Mapping[str, Json], asked: Asked, command: str, seconds: float
) -> Json:
    model = harness.model
    return {
        "schema": SCHEMA,
        "created": now(),
        "command": command,
        "versions": dict(versions()) | {"lm_eval": package_version("lm_eval")},
        "device": device_facts(str(model.compute.device)),
        "model": model_section(model),
        "asked": asdict(asked) | {"include_path": asked.include_path and str(asked.include_path)},
        "max_length": harness.max_length,
        "dtype": str(model.compute.dtype).removeprefix("torch."),
        "arms": [_arm(harness, arm) for arm in harness.arms],
        "caches_grew": harness.grew,
        "rows": rows_of(found),
        "performance": {
            "wall_s": seconds,
            "sweeps": harness.sweeps,
            "walks": harness.walks,
            "weight_bytes_read": harness.bytes_read,
        },
    }


def _arm(harness: Harness, arm: HarnessArm) -> Json:
    return {
        "arm": arm.name,
        "growing": arm.growing.name,
        "requested": arm.whole.requested,
        "status": "nonfinite" if arm in harness.ill else "ok",
        "why": harness.ill.get(arm),
        "folder": folder_of(arm),
    }


def rows_of(found: Mapping[str, Json]) -> list[Json]:
    """A row for each metric of each task, then of each group, with the values of all arms and the
    paired differences from the exact cache; a group's are over the documents of all its tasks."""
    first = next(iter(found.values()))
    samples = {
        name: {arm: results["samples"][name] for arm, results in found.items()}
        for name in first["samples"]
    }
    rows = [row for name, its in samples.items() for row in _rows(name, "results", its, found)]
    for group in first.get("groups", {}):
        leaves = [name for name in _leaves(group, first["group_subtasks"]) if name in samples]
        pooled = {arm: [one for name in leaves for one in samples[name][arm]] for arm in found}
        rows += _rows(group, "groups", pooled, found)
    return rows


def _rows(
    name: str, section: str, samples: Mapping[str, Sequence[Mapping[str, Any]]],
    found: Mapping[str, Json],
) -> Iterator[Json]:  # fmt: skip
    every = list(samples.values())
    of = [[(one["doc_id"], one["prompt_hash"], one["filter"]) for one in its] for its in every]
    assert all(documents == of[0] for documents in of), "all arms answered the same documents"
    for metric, filter_name in metrics_of(every[0]):
        key, error = f"{metric},{filter_name}", f"{metric}_stderr,{filter_name}"
        values = {arm: results[section][name].get(key) for arm, results in found.items()}
        errors = {arm: results[section][name].get(error) for arm, results in found.items()}
        if metric == ANSWER_NLL:
            own = {arm: answer_nll(its, filter_name) for arm, its in samples.items()}
            values, errors = ({arm: both[part] for arm, both in own.items()} for part in (0, 1))
        elif None in values.values():
            continue  # a group that does not average this metric
        better = next(iter(found.values()))["higher_is_better"].get(name, {}).get(metric)
        yield {
            "task": name,
            "metric": metric,
            "filter": filter_name,
            "n": sum(one["filter"] == filter_name for one in every[0]),
            "higher_is_better": False if metric == ANSWER_NLL else better,
            "values": {arm: _number(value) for arm, value in values.items()},
            "stderr": {arm: _number(value) for arm, value in errors.items()},
            "differences": [asdict(one) for one in differences(samples, metric, filter_name)],
        }


def _leaves(group: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of all tasks below a group."""
    below = subtasks.get(group, [])
    return [leaf for name in below for leaf in (_leaves(name, subtasks) or [name])]


def _number(value: object) -> float | None:
    """None for lm-eval's "N/A", and for what JSON has no word for."""
    return finite(value) if isinstance(value, (int, float)) else None
