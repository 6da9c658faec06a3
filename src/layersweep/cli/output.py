"""The folder of a run: what it belongs to, sweeps as they finish, results and report last.

manifest.json          what the numbers belong to; --resume refuses a folder with another one
sweeps/0000.safetensors, ...   the numbers of finished sweeps, each whole or not there
segments.jsonl, needle.jsonl   the same for people, a line per window or needle
results.json, report.html, windows.csv
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
from layersweep.evals.finished import DamagedSweep, FinishedSweep, pack, unpack
from layersweep.evals.manifest import differences, manifest_of
from layersweep.evals.needle_job import NAME as NEEDLE
from layersweep.evals.perplexity import NAME as PERPLEXITY
from layersweep.evals.results import needle_lines, segment_lines
from layersweep.evals.study import Study
from layersweep.report.store import write_atomically

MANIFEST, SWEEPS, LOCK = "manifest.json", "sweeps", ".lock"
LINES = {PERPLEXITY: ("segments.jsonl", segment_lines), NEEDLE: ("needle.jsonl", needle_lines)}


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
        self._lock = _lock(path)
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
        with _writing(self.path):
            (self.path / SWEEPS).mkdir(exist_ok=True)
            if self.resume and (self.path / MANIFEST).exists():
                self._check_manifest(manifest)
                self._put_back(study, say)
            else:
                if self.resume:
                    say(f"note: {self.path} holds no run yet: nothing to resume, a new one starts")
                write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1))
            self.usable = True

    def keep(self, study: Study, sweep: FinishedSweep) -> None:
        """Write down a sweep that has just finished: its numbers first, which count."""
        if self.path is None:
            return
        with _writing(self.path):
            number = 1 + max(self._numbers(), default=-1)
            write_atomically(self.path / SWEEPS / f"{number:04}.safetensors", pack(study, sweep))
            self._add_lines(study, sweep)

    def finish(self, results: dict[str, Any]) -> None:
        """results.json, report.html and windows.csv, each whole or not at all."""
        if self.path is None:
            return
        from layersweep.report.html import write_html
        from layersweep.report.store import write_results

        with _writing(self.path):
            write_results(self.path, results)
            if results["status"] == "complete":
                from layersweep.report.export import windows_csv

                write_html(self.path, results)
                if results["perplexity"] is not None:
                    write_atomically(self.path / "windows.csv", windows_csv(results))

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
        for name, _ in LINES.values():
            (self.path / name).unlink(missing_ok=True)
        sweeps = []
        for number in sorted(self._numbers()):
            path = self.path / SWEEPS / f"{number:04}.safetensors"
            try:
                sweeps.append(unpack(study, path.read_bytes()))
            except DamagedSweep as failure:
                say(f"note: {path}: {failure}; its tiles are computed again")
                path.unlink()
                continue
            self._add_lines(study, sweeps[-1])
        study.resume(sweeps)
        say(
            f"note: resumed behind {len(sweeps)} finished sweep(s): "
            f"{len(study.resumed)} of {len(study.tiles)} tiles are there"
        )

    def _numbers(self) -> list[int]:
        assert self.path is not None
        return [int(path.stem) for path in (self.path / SWEEPS).glob("[0-9]*.safetensors")]

    def _add_lines(self, study: Study, sweep: FinishedSweep) -> None:
        assert self.path is not None
        for part in sweep.parts:
            name, lines_of = LINES[part.job]
            with (self.path / name).open("a", encoding="utf-8") as stream:
                lines = lines_of(study, part.first, part.count)
                stream.writelines(json.dumps(line) + "\n" for line in lines)


def _lock(path: Path) -> int:
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
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        os.close(handle)
        raise InputError(
            f"--out {path}: found another run at work there, needed a folder of its own",
            hint="wait for it to end, or name another folder",
        ) from failure
    return handle


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise MachineError(
            f"{failure.filename or path}: cannot be written ({failure.strerror})",
            hint="make room, then go on with --resume: finished sweeps are kept",
        ) from failure
