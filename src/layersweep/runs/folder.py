"""The folder of a run: what it belongs to, sweeps as they finish, results and report last.

manifest.json          what the numbers belong to; --resume refuses a folder with another one
study.json             the windows and needles, and which of them are this process's: for `merge`
sweeps/0000.safetensors, ...   the numbers of finished sweeps, each whole or not there
segments.jsonl, needle.jsonl   the same for people, a line per window or needle
results.json, report.html, windows.csv
shards/1-of-2, ...     the same for each of several processes (cli/shards.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layersweep.errors import InputError
from layersweep.runs.differences import differences
from layersweep.runs.files import lock, write_atomically, writing
from layersweep.runs.finished import DamagedSweep, FinishedSweep, pack, unpack
from layersweep.runs.merge import Merged, ShardOutput
from layersweep.runs.record import Json, Record, TileKey
from layersweep.tasks.registry import TASKS

MANIFEST, FACTS, SWEEPS, RESULTS = "manifest.json", "study.json", "sweeps", "results.json"
SHARDS = "shards"


class RunFolder:
    """A context: the folder is this process's own while it is open. `path` None writes nothing.

    Refuses, before anything is read, a folder that holds a run which is not to be resumed, or in
    which another process works. `say` is told what a person should know.

    Raises InputError for these, for a file in the folder's place, and for a folder that cannot be
    written; MachineError when a write fails later.
    """

    def __init__(
        self, path: Path | None, say: Callable[[str], None], *, resume: bool = False
    ) -> None:
        self.path, self.say, self.resume = path, say, resume
        self.usable, self._lock = False, None
        self._done: list[TileKey] = []
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
                hint="--resume continues that run; or name another folder, or delete this one",
            )
        if (path / SHARDS).exists():
            raise InputError(
                f"--out {path}: found the shards of a run on several devices, needed a folder "
                "without",
                hint="--resume on as many devices continues that run; or name another folder",
            )
        self._lock = lock(path, say)
        self.usable = not (path / MANIFEST).exists()  # not yet: it may be somebody else's run

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def start(self, manifest: Json, record: Record, shard: str) -> list[FinishedSweep] | None:
        """Write what the numbers of `record` belong to; or, where a run is resumed, check that, put
        its numbers back into `record`, and return its finished sweeps."""
        assert self.path is not None
        sweeps = None
        with writing(self.path):
            (self.path / SWEEPS).mkdir(exist_ok=True)
            if self.resume and (self.path / MANIFEST).exists():
                self._check_manifest(manifest)
                sweeps = self._put_back(record)
            else:
                if self.resume:
                    self.say(
                        f"note: {self.path} holds no run yet: nothing to resume, a new one starts"
                    )
                write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1))
            _write_facts(self.path, record, shard)
            self.usable = True
        return sweeps

    def keep(self, record: Record, sweep: FinishedSweep) -> None:
        """Write down a sweep that has just finished: its numbers first, which count."""
        if self.path is None:
            return
        with writing(self.path):
            number = 1 + max(self._numbers(), default=-1)
            write_atomically(_sweep_file(self.path, number), pack(record, sweep))
            self._done += sweep.tiles
            _write_lines(self.path, record, self._done)

    def _check_manifest(self, manifest: Json) -> None:
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

    def _put_back(self, record: Record) -> list[FinishedSweep]:
        assert self.path is not None
        sweeps = []
        for number in sorted(self._numbers()):
            path = _sweep_file(self.path, number)
            try:
                sweeps.append(unpack(record, path.read_bytes()))
            except DamagedSweep as failure:
                self.say(f"note: {path}: {failure}; its tiles are computed again")
                path.unlink()
                continue
            self._done += sweeps[-1].tiles
        _write_lines(self.path, record, self._done)
        return sweeps

    def _numbers(self) -> list[int]:
        assert self.path is not None
        return [int(path.stem) for path in (self.path / SWEEPS).glob("[0-9]*.safetensors")]


def read_part(folder: Path, load_results: Callable[[Path], Json]) -> ShardOutput:
    """What a run has left in its folder. Raises InputError where it has not come to results."""
    found: dict[str, Any] = {}
    for name in (MANIFEST, FACTS, RESULTS):
        path = folder / name
        if not path.is_file():
            raise InputError(
                f"{folder}: found no {name}, needed the folder of a run that came to its end",
                hint="run it again with --resume, or name the folder that `eval --out` wrote",
            )
        try:
            found[name] = load_results(path) if name == RESULTS else _json_object(path)
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
    return ShardOutput(str(folder), shard, found[MANIFEST], facts, found[RESULTS], sweeps)


def parts_of(folder: Path) -> list[Path]:
    """The folders of the processes that computed a run: its own, or those in its shards."""
    return sorted((folder / SHARDS).glob("*-of-*")) or [folder]


def write_merged(folder: Path, merged: Merged, parts: list[Path]) -> None:
    """The folder of what several processes computed, as one would have left it, but for the report.

    Raises OSError.
    """
    manifest = (parts[0] / MANIFEST).read_text("utf-8")
    write_atomically(folder / MANIFEST, manifest.rstrip())
    _write_facts(folder, merged.record, "1/1")
    write_atomically(_sweep_file(folder, 0), pack(merged.record, merged.done))
    done = sorted(merged.done.tiles, key=merged.record.tiles.index)
    _write_lines(folder, merged.record, done)


def _sweep_file(folder: Path, number: int) -> Path:
    return folder / SWEEPS / f"{number:04}.safetensors"


def _write_facts(folder: Path, record: Record, shard: str) -> None:
    write_atomically(folder / FACTS, json.dumps({"shard": shard, **record.facts()}))


def _write_lines(folder: Path, record: Record, tiles: Sequence[TileKey]) -> None:
    """The files that people read while a run is under way: a line per item of finished tiles.

    Written anew each time, which is cheap, since some object stores do not let a file grow.
    """
    for kind in TASKS:
        own = [line for tile in tiles if tile.task == kind.name for line in record.lines(tile)]
        if own:
            write_atomically(folder / kind.lines, "\n".join(map(json.dumps, own)))
        else:
            (folder / kind.lines).unlink(missing_ok=True)


def _json_object(path: Path) -> Json:
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"found {type(content).__name__}, needed an object")
    return content
