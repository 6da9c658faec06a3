"""The folders that are pushed: one per kernel, and the wheelhouse."""

from __future__ import annotations

import json
import pprint
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layersweep.errors import InputError
from layersweep.kaggle.metadata import Id, Sources, dataset_metadata, kernel_metadata
from layersweep.kaggle.sources import ModelSource, Staged
from layersweep.kaggle.wheel import check_wheel, write_wheel

KERNEL, DATASET, OURS = "kernel-metadata.json", "dataset-metadata.json", "layersweep-kaggle.json"
SCHEMA = "layersweep.kaggle/1"
BLANK = "SETTINGS: dict[str, Any] = {}\n"


@dataclass(frozen=True)
class Push:
    """What is to be pushed. `study`, `rehearsal` and `plan` are arguments of layersweep's
    commands, with {files} for the folder of `files`, which travel with the wheels. `gpus` 0 is a
    run on the CPU; `earlier` the kind and id of what holds an earlier run."""

    ident: Id
    model: ModelSource
    staged: Staged | None
    study: list[str]
    rehearsal: list[str]
    plan: list[str]
    gpus: int
    offline: bool
    files: Mapping[str, bytes] = field(default_factory=dict)
    wheels: list[Path] = field(default_factory=list)
    earlier: tuple[str, str] | None = None
    again: str = ""


@dataclass(frozen=True)
class Written:
    """Names of the kernels' folders in the order of pushing, and the wheels."""

    stages: list[str]
    wheels: list[Path]


def write_folders(folder: Path, push: Push) -> Written:
    """Everything below `folder`. Raises InputError for a folder that holds something else."""
    given = [check_wheel(path) for path in push.wheels]
    _clear(folder)
    (folder / OURS).write_text(json.dumps({"schema": SCHEMA, "id": str(push.ident)}) + "\n")
    wheels = _write_wheelhouse(folder / "wheels", push, build="layersweep" not in given)
    stages = _write_stages(folder, push.ident, push.staged) if push.staged else []
    mounts = _mounts(push, stages)
    shared = {
        "model": str(push.model),
        "wheels": push.ident.of("wheels"),
        "offline": push.offline,
    }
    rehearse = {"job": "rehearse", **shared, "rehearsal": push.rehearsal, "plan": push.plan}
    internet = not push.offline
    metadata = kernel_metadata(push.ident, "rehearse", mounts, gpu=False, internet=internet)
    _write_kernel(folder / "rehearse", metadata, rehearse)
    run = {"job": "run", **shared, "study": push.study, "gpus": push.gpus, "again": push.again}
    earlier = _with_earlier(mounts, push.earlier)
    metadata = kernel_metadata(push.ident, "run", earlier, gpu=push.gpus > 0, internet=internet)
    _write_kernel(folder / "run", metadata, run)
    return Written(stages, wheels)


def filled_in(template: str, settings: Mapping[str, Any]) -> str:
    """The kernel's source with its settings in place."""
    before, blank, after = template.partition(BLANK)
    assert blank, "kernel.py has lost its line for the settings"
    words = pprint.pformat(dict(settings), sort_dicts=False, width=96)
    return f"{before}SETTINGS: dict[str, Any] = {words}\n{after}"


def _mounts(push: Push, stages: list[str]) -> Sources:
    reference = push.model.reference
    return Sources(
        [push.ident.of("wheels"), *([reference] if push.model.kind == "dataset" else [])],
        [push.ident.of(name) for name in stages],
        [reference] if push.model.kind == "kaggle-model" else [],
    )


def _with_earlier(mounts: Sources, earlier: tuple[str, str] | None) -> Sources:
    if earlier is None:
        return mounts
    kind, reference = earlier
    if kind == "dataset":
        return replace(mounts, datasets=[*mounts.datasets, reference])
    return replace(mounts, kernels=[*mounts.kernels, reference])


def _write_stages(folder: Path, ident: Id, staged: Staged) -> list[str]:
    """A kernel for each job; their names."""
    names = [f"stage-{number}" for number in range(1, len(staged.jobs) + 1)]
    for name, files in zip(names, staged.jobs, strict=True):
        settings = {
            "job": "stage",
            "repository": staged.repository,
            "commit": staged.commit,
            "files": files,
        }
        metadata = kernel_metadata(ident, name, Sources(), gpu=False, internet=True)
        _write_kernel(folder / name, metadata, settings)
    return names


def _write_kernel(folder: Path, metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    folder.mkdir()
    template = (Path(__file__).parent / "kernel.py").read_text("utf-8")
    (folder / "kernel.py").write_text(filled_in(template, settings), encoding="utf-8")
    (folder / KERNEL).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _write_wheelhouse(folder: Path, push: Push, *, build: bool) -> list[Path]:
    """Our wheel, those given besides, and files that the study needs: flat, since `kaggle
    datasets create` skips folders."""
    folder.mkdir()
    if build:
        write_wheel(folder)
    for path in push.wheels:
        shutil.copyfile(path, folder / path.name)
    for name, data in push.files.items():
        (folder / name).write_bytes(data)
    (folder / DATASET).write_text(json.dumps(dataset_metadata(push.ident), indent=2) + "\n")
    return sorted(folder.glob("*.whl"))


def _clear(folder: Path) -> None:
    """Empty a folder that `layersweep kaggle` wrote, and no other."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise InputError(
            f"{folder}: cannot be a folder ({failure.strerror})", hint="name another folder"
        ) from failure
    if not any(folder.iterdir()):
        return
    if not (folder / OURS).is_file():
        raise InputError(
            f"{folder}: found other files, needed a new folder or one that "
            "`layersweep kaggle` wrote",
            hint="name another folder",
        )
    for path in folder.iterdir():
        if path.name in ("rehearse", "run", "wheels") or path.name.startswith("stage-"):
            shutil.rmtree(path)
