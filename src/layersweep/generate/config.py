"""generation_config.json, or metadata of GGUF: the tokens that end a text, and how its model wants
to be sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layersweep.checkpoint.gguf.opening import read_files
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import InputError
from layersweep.generate.request import Sampling

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationConfig:
    """`ends`: ids that end a text. `sampling`: the model's defaults, transformers' where it has
    none of its own."""

    ends: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def read(cls, folder: Path) -> GenerationConfig:
        """Of a checkpoint's folder; end tokens of config.json where there is no file, as in
        transformers. `folder` may be a GGUF file. Raises InputError that names the file and the
        field."""
        if folder.is_file():
            return cls._of_gguf(folder)
        fields = _fields(folder / FILE)
        if not fields:
            config = _fields(folder / "config.json")
            text = config.get("text_config")
            ends = config.get("eos_token_id", text.get("eos_token_id") if text else None)
            return cls(_ids(ends, folder / "config.json"))
        file, own = folder / FILE, Sampling()

        def number(name: str, default: float) -> float:
            value = fields.get(name)
            return default if value is None else _number(value, name, file)

        sampling = Sampling(
            max_new_tokens=int(number("max_new_tokens", own.max_new_tokens)),
            do_sample=fields.get("do_sample") is True,
            temperature=number("temperature", own.temperature),
            top_k=int(number("top_k", own.top_k)),
            top_p=number("top_p", own.top_p),
            min_p=number("min_p", own.min_p),
            repetition_penalty=number("repetition_penalty", own.repetition_penalty),
        )
        return cls(_ids(fields.get("eos_token_id"), file), sampling)

    @classmethod
    def _of_gguf(cls, path: Path) -> GenerationConfig:
        """Ends of a text, of a turn and of a message; settings where the file recommends some."""
        fields, own = read_files(path).fields, Sampling()
        ends = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))

        def number(name: str, default: float) -> float:
            key = f"general.sampling.{name}"
            value = fields.get(key)
            return default if value is None else _number(value, key, path)

        sampling = Sampling(
            do_sample=number("temp", 0.0) > 0,
            temperature=number("temp", own.temperature),
            top_k=int(number("top_k", own.top_k)),
            top_p=number("top_p", own.top_p),
            min_p=number("min_p", own.min_p),
            repetition_penalty=number("penalty_repeat", own.repetition_penalty),
        )
        return cls(_ids([one for one in ends if one is not None], path), sampling)


def _fields(path: Path) -> dict[str, Any]:
    try:
        value, _ = parse_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, UnusableJson) as error:
        raise InputError(f"{path}: found {error}, needed a JSON object") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: found JSON that is no object, needed one")
    return value


def _ids(value: object, path: Path) -> frozenset[int]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise InputError(f"{path}: found eos_token_id {value!r}, needed an id or a list of ids")
    return frozenset(found)


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: found {name} {value!r}, needed a number")
    return value
