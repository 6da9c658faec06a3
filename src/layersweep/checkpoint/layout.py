"""Opening a checkpoint: `demo`, a local folder or a hub id becomes a validated `Checkpoint`."""

from __future__ import annotations

import re
from pathlib import Path

from layersweep.checkpoint.files import LocalFolder
from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.reading import scan_folder
from layersweep.checkpoint.storage.ggml import SUFFIX
from layersweep.checkpoint.weights import Checkpoint, Weight
from layersweep.errors import InputError
from layersweep.problems import Problem, printable, problems_error

__all__ = [
    "Checkpoint",
    "Problem",
    "StoredTensor",
    "Weight",
    "open_checkpoint",
    "scan_checkpoint",
]

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_checkpoint(
    source: str, revision: str | None = None, *, generic: bool = False
) -> Checkpoint:
    """A checkpoint whose headers are valid. A hub id is downloaded if it is not in the cache.

    `source`: "demo", a local folder, or a hub id "org/name" (`revision`: branch, tag or commit).
    Its headers are checked before the download starts. `generic`: as transformers' own layers
    compute it, though this package has a program for it; of a folder. Raises CheckpointError for
    what the checkpoint is, InputError for arguments that do not go together.
    """
    if generic or not _is_hub_id(source):
        return _checked(scan_checkpoint(source, revision, generic=generic))
    from layersweep.checkpoint import hub  # its imports take 0.3 s that local folders never need

    repository = hub.find(source, revision)
    checkpoint, problems = repository.scan_cached()
    if checkpoint is not None:
        return checkpoint
    if repository.files is None:
        raise repository.incomplete(problems)
    return _checked(repository.download(_checked(repository.scan())))


def scan_checkpoint(
    source: str, revision: str | None = None, *, generic: bool = False
) -> tuple[Checkpoint | None, list[Problem]]:
    """The checkpoint, or every problem with it. Of a hub id only headers are read, by ranges.

    Raises CheckpointError or InputError where there is nothing to scan at all.
    """
    if _is_hub_id(source) and not generic:
        from layersweep.checkpoint import hub

        return hub.find(source, revision).scan()
    if revision is not None:
        raise InputError(
            f"--revision: found '{revision}' for {printable(source)}, needed a hub id to apply to",
            hint="a local folder and demo have one revision: leave --revision out",
        )
    folder = demo_folder() if source == DEMO else Path(source).expanduser()
    if folder.suffix == SUFFIX and folder.is_file():
        if generic:
            raise InputError(
                f"{printable(source)}: found a GGUF file, needed a folder with config.json for "
                "transformers' own layers",
                hint="leave out --program generic",
            )
        from layersweep.checkpoint.gguf.opening import scan_gguf_checkpoint

        return scan_gguf_checkpoint(source, folder)
    opened = LocalFolder.at(folder)
    snapshot = opened.root.name
    in_cache = opened.root.parent.name == "snapshots" and _COMMIT.fullmatch(snapshot)
    revision = snapshot if in_cache else None
    return scan_folder(opened, source, revision, folder, generic=generic)


def demo_folder() -> Path:
    """The checkpoint that is shipped with the package."""
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def _is_hub_id(source: str) -> bool:
    return source != DEMO and not Path(source).exists() and bool(_HUB_ID.fullmatch(source))


def _checked(scanned: tuple[Checkpoint | None, list[Problem]]) -> Checkpoint:
    checkpoint, problems = scanned
    if checkpoint is None:
        raise problems_error(problems)
    return checkpoint
