"""The folder of a run: manifest first, lines as sweeps finish, results and report last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layersweep.errors import InputError
from layersweep.evals.needle_job import NAME as NEEDLE
from layersweep.evals.perplexity import NAME as PERPLEXITY
from layersweep.evals.results import needle_lines, segment_lines
from layersweep.evals.study import Study
from layersweep.report.store import write_atomically
from layersweep.sweep.sequences import Tile

MANIFEST = "manifest.json"


class RunFolder:
    """`path` None writes nothing. Refuses, before anything is read, a folder that holds a run.

    Raises InputError for a file in the folder's place, a folder in use, or one that cannot be
    written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.usable = False
        if path is None:
            return
        if path.exists() and not path.is_dir():
            raise InputError(
                f"--out {path}: found a file, needed a folder", hint="name another folder"
            )
        if (path / MANIFEST).exists():
            raise InputError(
                f"--out {path}: found the manifest of an earlier run, needed a folder without one",
                hint="name another folder, or delete this one",
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as failure:
            raise InputError(
                f"--out {path}: cannot be written ({failure.strerror})",
                hint="name a folder that you may write to",
            ) from failure
        self.usable = True

    def start(self, study: Study) -> None:
        """Write the manifest: what this folder's numbers belong to."""
        if self.path is None:
            return
        checkpoint = study.model.checkpoint
        manifest = {
            "schema": "layersweep.manifest/1",
            "fingerprint": checkpoint.fingerprint,
            "text_sha256": study.text.sha256,
            "tokenizer_sha256": study.tokenizer.sha256,
            "arms": [arm.name for arm in study.arms],
            "settings": {name: value for name, value in vars(study.settings).items()},
        }
        write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1))

    def append(self, study: Study, tiles: list[Tile]) -> None:
        """Add the finished windows and trials of a sweep to segments.jsonl and needle.jsonl."""
        if self.path is None:
            return
        for tile in tiles:
            count = len(tile.sequences)
            if tile.name == PERPLEXITY:
                self._add("segments.jsonl", segment_lines(study, tile.first, count))
            elif tile.name == NEEDLE:
                self._add("needle.jsonl", needle_lines(study, tile.first, count))
        if not tiles and study.needle:
            self._add("needle.jsonl", needle_lines(study, 0, len(study.needle.trials)))

    def finish(self, results: dict[str, Any]) -> None:
        """results.json, report.html and windows.csv, each whole or not at all."""
        if self.path is None:
            return
        from layersweep.report.html import write_html
        from layersweep.report.store import write_results

        write_results(self.path, results)
        if results["status"] == "complete":
            from layersweep.report.export import windows_csv

            write_html(self.path, results)
            if results["perplexity"] is not None:
                write_atomically(self.path / "windows.csv", windows_csv(results))

    def _add(self, name: str, lines: list[dict[str, Any]]) -> None:
        assert self.path is not None
        with (self.path / name).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
