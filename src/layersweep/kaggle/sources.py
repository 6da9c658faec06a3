"""Where the model comes from on Kaggle, and how its files are divided among stage kernels.

demo                                     in the wheel
ORG/NAME                                 a hub id: staged by kernels of its own
dataset:OWNER/SLUG                       a Kaggle dataset: mounted
kaggle-model:OWNER/MODEL/FRAMEWORK/VARIATION/VERSION    a Kaggle model: mounted
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layersweep.errors import InputError
from layersweep.units import format_bytes

GRAMMAR = (
    "demo, ORG/NAME of the hub, dataset:OWNER/SLUG, or "
    "kaggle-model:OWNER/MODEL/FRAMEWORK/VARIATION/VERSION"
)
JOB_BYTES = 19_000_000_000  # /kaggle/working keeps 20 GB of a kernel's output
_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_DATASET = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_MODEL = re.compile(rf"{_NAME}/{_NAME}/{_NAME}/{_NAME}/[0-9]+", re.ASCII)
_KERNEL = re.compile(rf"{_NAME}/{_NAME}(/[0-9]+)?", re.ASCII)

Kind = Literal["demo", "hub", "dataset", "kaggle-model"]


@dataclass(frozen=True)
class ModelSource:
    """A parsed --model: `reference` is what the hub or Kaggle calls it."""

    kind: Kind
    reference: str

    def __str__(self) -> str:
        return self.reference if self.kind in ("demo", "hub") else f"{self.kind}:{self.reference}"


@dataclass(frozen=True)
class Staged:
    """What stage kernels copy: one commit, and the files of each kernel with their sizes."""

    repository: str
    commit: str
    jobs: tuple[dict[str, int], ...]


def parse_model(text: str) -> ModelSource:
    """Raises InputError for what is none of the four."""
    prefix, colon, rest = text.partition(":")
    if text == "demo":
        return ModelSource("demo", text)
    if colon and prefix == "dataset" and _DATASET.fullmatch(rest):
        return ModelSource("dataset", rest)
    if colon and prefix == "kaggle-model" and _MODEL.fullmatch(rest):
        return ModelSource("kaggle-model", rest)
    if Path(text).expanduser().exists():
        raise InputError(
            f"--model: found the local folder '{text}', needed {GRAMMAR}",
            hint="`kaggle datasets create` makes a dataset of the folder: then --model "
            "dataset:OWNER/SLUG",
        )
    if _HUB_ID.fullmatch(text):
        return ModelSource("hub", text)
    raise InputError(f"--model: found '{text}', needed {GRAMMAR}", hint="--model demo to try it")


def parse_earlier(text: str) -> tuple[Literal["kernel", "dataset"], str]:
    """Of --resume-from: OWNER/SLUG of a kernel, or dataset:OWNER/SLUG."""
    if text.startswith("dataset:") and _DATASET.fullmatch(text.removeprefix("dataset:")):
        return "dataset", text.removeprefix("dataset:")
    if _KERNEL.fullmatch(text):
        return "kernel", text
    raise InputError(
        f"--resume-from: found '{text}', needed OWNER/SLUG of the kernel that ran, or "
        "dataset:OWNER/SLUG",
        hint="--resume-from with the id of `run`, for example me/study-run",
    )


def staged(repository: str, revision: str | None) -> Staged:
    """Ask the hub for the files of one commit, check their headers, and divide them into jobs.

    Raises CheckpointError for a checkpoint with problems, InputError if the hub is out of reach or
    a shard is too large.
    """
    from layersweep.checkpoint import hub
    from layersweep.problems import problems_error

    found = hub.find(repository, revision)
    if found.files is None:
        raise InputError(
            f"--model {repository}: found no connection to the hub, needed its list of files",
            hint="connect to the network, or mount a copy: --model dataset:OWNER/SLUG",
        )
    checkpoint, problems = found.scan()
    if checkpoint is None:
        raise problems_error(problems)
    sizes = found.wanted(checkpoint)
    return Staged(repository, found.files.commit, share_out(sizes, JOB_BYTES))


def share_out(sizes: Mapping[str, int], limit: int = JOB_BYTES) -> tuple[dict[str, int], ...]:
    """Files into jobs of at most `limit` bytes: the first job with room takes the next file, small
    files first, then the largest shards. So all small files are in the first job.

    Raises InputError for a file larger than `limit`.
    """
    for name, size in sizes.items():
        if size > limit:
            raise InputError(
                f"{name}: found {format_bytes(size)}, needed at most {format_bytes(limit)}: "
                "Kaggle keeps 20 GB of a kernel's output",
                hint="upload the model as a Kaggle dataset: --model dataset:OWNER/SLUG",
            )
    shards = {name for name in sizes if name.endswith(".safetensors")}
    order = sorted(sizes, key=lambda name: (name in shards, -sizes[name], name))
    jobs: list[dict[str, int]] = []
    for name in order:
        for job in jobs:
            if sum(job.values()) + sizes[name] <= limit:
                break
        else:
            job = {}
            jobs.append(job)
        job[name] = sizes[name]
    return tuple(jobs)
