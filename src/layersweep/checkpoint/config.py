"""config.json -> the decoder that it describes, every field checked that the maths depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layersweep.checkpoint.storage import NO_SETTINGS, Settings, read_settings
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import CheckpointError
from layersweep.families.fields import HINT
from layersweep.families.registry import Description, describe
from layersweep.families.spec import Decoder
from layersweep.problems import TWICE, Problem, problems_error


def read_config(folder_or_json: Path | str) -> Decoder:
    """The decoder of a folder's config.json, or of that file. Raises CheckpointError."""
    path = Path(folder_or_json)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: found no readable file, needed the model's config.json", hint=HINT
        ) from error
    described = parse_config(raw, str(path))
    if described.decoder is None:
        raise problems_error(described.problems)
    return described.decoder


@dataclass(frozen=True)
class Config(Description):
    """What config.json describes, and what it says of how the weights are stored."""

    settings: Settings = NO_SETTINGS


def parse_config(raw: bytes, file: str, *, generic: bool = False) -> Config:
    """What the bytes of config.json say, or everything that is wrong with them. `generic`: see
    families/registry.describe."""
    try:
        fields, repeated = parse_json(raw)
    except UnusableJson as error:
        return Config(None, None, [Problem(file, None, str(error), "a JSON object", HINT)])
    if not isinstance(fields, dict):
        found = "JSON that is no object"
        return Config(None, None, [Problem(file, None, found, "a JSON object", HINT)])
    problems = [Problem(file, key, *TWICE, HINT) for key in repeated]
    described = describe(fields, file, generic=generic)
    settings, refused = read_settings(fields, file)
    problems += [*described.problems, *refused]
    if problems:
        return Config(None, None, problems)
    return Config(described.decoder, described.names, [], described.unused, settings)
