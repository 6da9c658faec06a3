"""results.json: its schema, written atomically, read back with errors a person can act on."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from layersweep.errors import InputError
from layersweep.runs.files import write_atomically
from layersweep.runs.folder import MANIFEST, RESULTS, SHARDS
from layersweep.runs.versions import EARLIER, SCHEMA

Json = dict[str, Any]

SHOWN_PROBLEMS = 5


@cache
def results_schema() -> Json:
    """The JSON Schema (draft 2020-12) of results.json."""
    text = resources.files("layersweep.report").joinpath("results.schema.json").read_text("utf-8")
    schema: Json = json.loads(text)
    return schema


def validate(results: Json, *, source: str = RESULTS) -> None:
    """Raises InputError that names every place (the first 5) where `results` breaks the schema."""
    found = jsonschema.Draft202012Validator(results_schema()).iter_errors(results)
    problems = sorted(f"{_place(error.absolute_path)}: {_reason(error)}" for error in found)
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        tail = f"; and {more} more" if more > 0 else ""
        raise InputError(
            f"{source} does not follow {SCHEMA}: {'; '.join(problems[:SHOWN_PROBLEMS])}{tail}",
            hint="use a results.json that this version of layersweep wrote",
        )


def write_results(directory: Path, results: Json) -> Path:
    """Writes DIRECTORY/results.json: whole or not at all, then checks it against the schema.

    The file is in place before the check, so that a long run is never lost to it.
    Raises ValueError if a number is NaN or infinite, InputError if the schema is broken.
    """
    path = directory / RESULTS
    write_atomically(path, json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False))
    validate(results, source=str(path))
    return path


def load_results(location: Path) -> Json:
    """The results in a run's folder, or in the file itself, checked against the schema. Those of
    an earlier version are returned as this one would have written them.

    Raises InputError when there is none, it is not JSON, or it does not follow the schema.
    """
    path = location / RESULTS if location.is_dir() else location
    if not path.is_file():
        if (location / MANIFEST).exists() or (location / SHARDS).exists():
            raise InputError(
                f"{location}: found no {RESULTS}, needed the folder of a run that came to its end",
                hint="`layersweep eval` continues it: the same command with --resume",
            )
        raise InputError(
            f"{path}: found no such file, needed the results of a run",
            hint="give the folder that `layersweep eval --out` wrote, or its results.json",
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: found text that is not JSON ({error}), needed {SCHEMA}",
            hint="run the evaluation again to have it written anew",
        ) from error
    found = results.get("schema") if isinstance(results, dict) else type(results).__name__
    if found not in (SCHEMA, EARLIER):
        raise InputError(
            f"{path}: found schema {found!r}, needed {SCHEMA!r}",
            hint="give a results.json that `layersweep eval` wrote",
        )
    if found == EARLIER:
        results = _upgraded(path, results)
    validate(results, source=str(path))
    checked: Json = results
    return checked


def _upgraded(path: Path, results: Json) -> Json:
    from layersweep.runs.upgrade import upgraded  # brings scipy, for files that few have

    try:
        return upgraded(results)
    except (KeyError, TypeError, ValueError) as failure:
        raise InputError(
            f"{path} does not follow {EARLIER}: {type(failure).__name__} {failure}",
            hint="use a results.json as `layersweep eval` wrote it",
        ) from failure


def _place(path: Any) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "(top level)"


def _reason(error: jsonschema.ValidationError) -> str:
    """The deepest cause: 'not valid under any of the given schemas' helps nobody."""
    if not error.context:
        return str(error.message)[:200]
    causes = [cause for cause in error.context if cause.validator != "type"]
    cause = max(causes or error.context, key=lambda inner: len(inner.absolute_path))
    return f"{_place(cause.absolute_path)}: {cause.message}"[:200]
