"""The folder of a run: what it belongs to, sweeps as they finish, results and report last.

manifest.json          what the numbers belong to; --resume refuses a folder with another one
study.json             the windows and needles, and which of them are this process's: for `merge`
sweeps/0000.safetensors, ...   the numbers of finished sweeps, each whole or not there
segments.jsonl, needle.jsonl   the same for people, a line per window or needle
results.json, report.html, windows.csv
shards/1-of-2, ...     the same for each of several processes (cli/shards.py)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layersweep.errors import InputError, MachineError
from layersweep.report.files import write_report
from layersweep.report.store import write_atomically
from layersweep.runs.differences import differences
from layersweep.runs.finished import DamagedSweep, FinishedSweep, pack, unpack
from layersweep.runs.merge import Merged, ShardOutput
from layersweep.runs.record import Record, TileKey
from layersweep.study.manifest import manifest_of
from layersweep.study.study import Study
from layersweep.tasks.registry import TASKS

MANIFEST, FACTS, SWEEPS, LOCK = "manifest.json", "study.json", "sweeps", ".lock"
SHARDS = "shards"
LINES = {kind.name: kind.lines for kind in TASKS}


class RunFolder:
    """A context: the folder is this process's own while it is open. `path` None writes nothing.

    Refuses, before anything is read, a folder that holds a run which is not to be resumed, or in
    which another process works.

    Raises InputError for these, for a file in the folder's place, and for a folder that cannot be
    written; MachineError when a write fails later.
    """

    def __init__(self, path: Path | None, *, resume: bool = False) -> None:
        self.path, self.resume = path, resume
        self.usable, self._lock = False, None
        if path is None:
            if resume:
                raise InputError("--resume: found no --out, needed the folder of the run to resume")
            return
        if path.exists() and not path.is_dir():
            raise InputError(
                f"--out {path}: found a file, needed a folder", hint="name another folder"
            )
        if (path / MANIFEST).exists() and not resume:
            raise InputError(
                f"--out {path}: found the manifest of an earlier run, needed a folder without one",
                hint="--resume goes on with that run; or name another folder, or delete this one",
            )
        if (path / SHARDS).exists():
            raise InputError(
                f"--out {path}: found the shards of a run on several devices, needed a folder "
                "without",
                hint="--resume on as many devices goes on with that run; or name another folder",
            )
        self._lock = lock(path)
        self.usable = not (path / MANIFEST).exists()  # not yet: it may be somebody else's run

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def start(self, study: Study, say: Callable[[str], None]) -> None:
        """Write the manifest, or check it and put back what finished sweeps had measured."""
        if self.path is None:
            return
        manifest = manifest_of(study)
        with writing(self.path):
            (self.path / SWEEPS).mkdir(exist_ok=True)
            if self.resume and (self.path / MANIFEST).exists():
                self._check_manifest(manifest)
                self._put_back(study, say)
            else:
                if self.resume:
                    say(f"note: {self.path} holds no run yet: nothing to resume, a new one starts")
                write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1))
            facts = {"shard": str(study.shard), **study.record.facts()}
            write_atomically(self.path / FACTS, json.dumps(facts))
            self.usable = True

    def keep(self, study: Study, sweep: FinishedSweep) -> None:
        """Write down a sweep that has just finished: its numbers first, which count."""
        if self.path is None:
            return
        with writing(self.path):
            number = 1 + max(self._numbers(), default=-1)
            data = pack(study.record, sweep)
            write_atomically(self.path / SWEEPS / f"{number:04}.safetensors", data)
            add_lines(self.path, study.record, sweep.tiles)

    def finish(self, results: dict[str, Any]) -> None:
        """results.json, report.html and windows.csv, each whole or not at all."""
        if self.path is not None:
            with writing(self.path):
                write_report(self.path, results)

    def _check_manifest(self, manifest: dict[str, Any]) -> None:
        assert self.path is not None
        try:
            found = json.loads((self.path / MANIFEST).read_text("utf-8"))
        except ValueError as failure:
            raise InputError(
                f"{self.path / MANIFEST}: cannot be read ({failure})",
                hint="start again in another folder",
            ) from failure
        if apart := differences(found, manifest):
            raise InputError(
                f"--resume {self.path}: found another run there: {'; '.join(apart)}",
                hint="resume with the command, files and versions that it was started with, or "
                "name another folder",
            )

    def _put_back(self, study: Study, say: Callable[[str], None]) -> None:
        """Read the finished sweeps, and write their lines again: the last may be torn."""
        assert self.path is not None
        for name in LINES.values():
            (self.path / name).unlink(missing_ok=True)
        sweeps = []
        for number in sorted(self._numbers()):
            path = self.path / SWEEPS / f"{number:04}.safetensors"
            try:
                sweeps.append(unpack(study.record, path.read_bytes()))
            except DamagedSweep as failure:
                say(f"note: {path}: {failure}; its tiles are computed again")
                path.unlink()
                continue
            add_lines(self.path, study.record, sweeps[-1].tiles)
        study.resume(sweeps)
        say(
            f"note: resumed behind {len(sweeps)} finished sweep(s): "
            f"{len(study.resumed)} of {len(study.own)} tiles are there"
        )

    def _numbers(self) -> list[int]:
        assert self.path is not None
        return [int(path.stem) for path in (self.path / SWEEPS).glob("[0-9]*.safetensors")]


def add_lines(folder: Path, record: Record, tiles: list[TileKey]) -> None:
    """Append finished tiles to the files that people read while a run is under way."""
    for tile in tiles:
        with (folder / LINES[tile.task]).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in record.lines(tile))


def read_part(folder: Path) -> ShardOutput:
    """What a run has left in its folder. Raises InputError where it has not come to results."""
    from layersweep.report.store import RESULTS_FILE, load_results

    found: dict[str, Any] = {}
    for name in (MANIFEST, FACTS, RESULTS_FILE):
        path = folder / name
        if not path.is_file():
            raise InputError(
                f"{folder}: found no {name}, needed the folder of a run that came to its end",
                hint="run it again with --resume, or name the folder that `eval --out` wrote",
            )
        try:
            found[name] = load_results(path) if name == RESULTS_FILE else _json_object(path)
        except ValueError as failure:
            if isinstance(failure, InputError):
                raise
            raise InputError(
                f"{path}: cannot be read ({failure})", hint="run it again with --resume"
            ) from failure
    facts = found[FACTS]
    sweeps = {
        f"{SWEEPS}/{path.name}": path.read_bytes()
        for path in sorted((folder / SWEEPS).glob("[0-9]*.safetensors"))
    }
    shard = str(facts.pop("shard", "1/1"))
    return ShardOutput(str(folder), shard, found[MANIFEST], facts, found[RESULTS_FILE], sweeps)


def parts_of(folder: Path) -> list[Path]:
    """The folders of the processes that computed a run: its own, or those in its shards."""
    return sorted((folder / SHARDS).glob("*-of-*")) or [folder]


def write_merged(folder: Path, merged: Merged, parts: list[Path]) -> None:
    """The folder of a result that several processes computed, as one process would have left it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        manifest = (parts[0] / MANIFEST).read_text("utf-8")
        write_atomically(folder / MANIFEST, manifest.rstrip())
        for name in LINES.values():
            (folder / name).unlink(missing_ok=True)
        facts = {"shard": "1/1", **merged.record.facts()}
        write_atomically(folder / FACTS, json.dumps(facts))
        data = pack(merged.record, merged.done)
        write_atomically(folder / SWEEPS / "0000.safetensors", data)
        done = sorted(merged.done.tiles, key=merged.record.tiles.index)
        add_lines(folder, merged.record, done)
        write_report(folder, merged.results)


def _json_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"found {type(content).__name__}, needed an object")
    return content


def lock(path: Path, *, wait: bool = False) -> int:
    """A lock on the folder that ends with this process at the latest, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as failure:
        raise InputError(
            f"--out {path}: cannot be written ({failure.strerror})",
            hint="name a folder that you may write to",
        ) from failure
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        os.close(handle)
        raise InputError(
            f"--out {path}: found another run at work there, needed a folder of its own",
            hint="wait for it to end, or name another folder",
        ) from failure
    return handle


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise MachineError(
            f"{failure.filename or path}: cannot be written ({failure.strerror})",
            hint="make room, then go on with --resume: finished sweeps are kept",
        ) from failure
