"""A folder with a model in 16 or 32 bits, of any family: what is taken from it besides weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from layersweep.checkpoint.files import LocalFolder, read_small
from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.shards import open_shards
from layersweep.checkpoint.storage.bitsandbytes import SUFFIXES
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import CheckpointError
from layersweep.problems import (
    DOWNLOAD_AGAIN,
    TWICE,
    FileProblem,
    Problem,
    problems_error,
    show,
)

CONFIG = "config.json"
# Tokenizer, chat template, generation settings, licence. Not card.json: its losses are those of
# the weights before.
_BESIDE = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.jinja", "generation_config.json", "LICEN[CS]E*", "NOTICE*"),
)
_PACKED_DTYPES = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2")
_TRANSPOSED = ("gpt2", "openai-gpt")  # transformers' Conv1D, which bitsandbytes packs turned
_AS_PUBLISHED = "give the model as it was published in 16 bits, a folder of safetensors"


@dataclass(frozen=True)
class Source:
    """The opened folder, the fields of its config.json, its tensors in the order of the files."""

    folder: LocalFolder
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def open_source(path: Path) -> Source:
    """Raises CheckpointError for what is no folder of safetensors with unpacked weights."""
    folder = _folder(path)
    problems: list[Problem] = []
    config = _config(folder)
    tensors = open_shards(folder, problems, []).tensors
    if problems:
        raise problems_error(problems)
    _check_unpacked(folder, config, tensors)
    return Source(folder, config, tensors)


def copy_beside(source: Source, destination: Path, made: list[Path]) -> None:
    """What a model needs beside its weights; each copy is put into `made` before it is made."""
    for name in sorted(source.folder.names()):
        if any(fnmatch(name, kind) for kind in _BESIDE) and (source.folder.root / name).is_file():
            made.append(destination / name)
            shutil.copyfile(source.folder.root / name, made[-1])


def _folder(path: Path) -> LocalFolder:
    if not path.exists():
        hub_id = not path.is_absolute() and len(path.parts) == 2
        raise CheckpointError(
            f"{path}: found nothing, needed a folder with a model in safetensors",
            hint=f"download it first: hf download {path} --local-dir DIR" if hub_id
            else "check the spelling",
        )  # fmt: skip
    if path.is_file():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        raise CheckpointError(f"{path}: found {kind}, needed a folder with a model in safetensors",
                              hint=_AS_PUBLISHED)  # fmt: skip
    folder = LocalFolder.at(path)
    names = sorted(folder.names())
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{path}: found only {gguf}, needed *.safetensors",
                              hint=_AS_PUBLISHED)  # fmt: skip
    return folder


def _config(folder: LocalFolder) -> Mapping[str, Any]:
    where = f"{folder.label}/{CONFIG}"
    try:
        fields, repeated = parse_json(read_small(folder, CONFIG))
    except UnusableJson as error:
        needed = "a JSON object"
        raise FileProblem(Problem(where, None, str(error), needed, DOWNLOAD_AGAIN)) from error
    if not isinstance(fields, dict):
        raise FileProblem(Problem(where, None, show(fields), "a JSON object", DOWNLOAD_AGAIN))
    if repeated:
        raise FileProblem(Problem(where, repeated[0], *TWICE, DOWNLOAD_AGAIN))
    return fields


def _check_unpacked(
    folder: LocalFolder, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    kind = config.get("model_type")
    if kind in _TRANSPOSED:
        found, needed = show(kind), "a model whose linear weights are [out, in]"
        where, hint = f"{folder.label}/{CONFIG}", "take a model of another family"
        raise FileProblem(Problem(where, "model_type", found, needed, hint))
    needed = "weights in BF16, F16 or F32"
    for name, stored in sorted(tensors.items()):  # a weight before its scales
        if _is_packed(name, stored):
            found = f"{stored.describe()}: already quantized"
            raise FileProblem(Problem(str(stored.file), name, found, needed, _AS_PUBLISHED))
    settings = config.get("quantization_config")
    if settings is not None:
        where = f"{folder.label}/{CONFIG}"
        hint = f"{_AS_PUBLISHED}; if its weights were dequantized, remove this field"
        found = f"{show(settings)}: already quantized"
        raise FileProblem(Problem(where, "quantization_config", found, needed, hint))


def _is_packed(name: str, stored: StoredTensor) -> bool:
    """Masks and positions are integers too: "....bias", or of one dimension."""
    if name.endswith(tuple(f".{suffix}" for suffix in SUFFIXES)):
        return True
    matrix = len(stored.shape) >= 2 and not name.endswith("bias")
    return matrix and stored.dtype in _PACKED_DTYPES
