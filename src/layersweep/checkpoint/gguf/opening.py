"""From a GGUF file, or the first of several, to a validated Checkpoint.

Its metadata become the fields of a config.json, its tensors get the names that families know, and
from there on it is read like any other checkpoint. What llama.cpp's converter does to weights is
undone where they are decoded: rows of q and k of a Llama are turned, norms of Gemma have 1 added.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layersweep.checkpoint.files import ByteSource, LocalFile, LocalFolder
from layersweep.checkpoint.gguf.config import FREQUENCIES, config_of
from layersweep.checkpoint.gguf.header import GgufHeader, Value, scan_gguf
from layersweep.checkpoint.gguf.metadata import ARCHITECTURE, Metadata
from layersweep.checkpoint.gguf.names import original, renamed
from layersweep.checkpoint.header import Header
from layersweep.checkpoint.reading import Layout, Place, fingerprint
from layersweep.checkpoint.shards import Shards, together
from layersweep.checkpoint.storage.floats import Floats
from layersweep.checkpoint.storage.ggml import Ggml
from layersweep.checkpoint.weights import Checkpoint, Weight
from layersweep.families.fields import HINT as CONFIG_HINT
from layersweep.families.names import Names
from layersweep.families.registry import Description, describe
from layersweep.families.spec import Decoder
from layersweep.problems import DOWNLOAD_AGAIN, FileProblem, Problem, show

TOKENS = "tokenizer.ggml.tokens"
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_DISAGREE = "the file's metadata and its tensors disagree: " + DOWNLOAD_AGAIN
_TURNED = re.compile(r"layers\.\d+\.([qk])_(?:proj|bias)")
_GPT_OSS_EXPERTS = {
    f"experts.{key}_{part}": (f"mlp.experts.{key}_projs.{{expert}}.{end}",)
    for key in ("gate", "up", "down")
    for part, end in (("proj", "weight"), ("bias", "bias"))
}


@dataclass(frozen=True)
class GgufFiles:
    """The file, or all files of a split one in order. `fields`: metadata of the first."""

    sources: dict[str, ByteSource]
    headers: dict[str, GgufHeader]
    problems: list[Problem]

    @property
    def fields(self) -> Mapping[str, Value]:
        return next(iter(self.headers.values())).fields


def read_files(path: Path) -> GgufFiles:
    """All headers of a file, or of a split one whose first file `path` is. Raises OSError."""
    first = LocalFile(path, path.stat().st_size)
    files = GgufFiles({path.name: first}, {path.name: scan_gguf(first)}, [])
    files.problems.extend(files.headers[path.name].problems)
    count = files.fields.get("split.count", 1)
    if files.problems or count == 1:
        return files
    match = _SPLIT.fullmatch(path.name)
    if match is None or type(count) is not int or int(match[3]) != count or int(match[2]) != 1:
        found = f"part {show(files.fields.get('split.no'))} of {show(count)} as {path.name}"
        needed = "the first file under its own name, ...-00001-of-0000N.gguf"
        hint = "give the first file of the model; the others lie beside it"
        files.problems.append(Problem(str(path), "split.count", found, needed, hint))
        return files
    folder = LocalFolder.at(path.parent)
    for number in range(2, count + 1):
        name = f"{match[1]}-{number:05}-of-{count:05}.gguf"
        try:
            files.sources[name] = folder.open(name)
        except FileProblem as error:
            files.problems.append(error.problem)
            return files
        files.headers[name] = scan_gguf(files.sources[name])
        files.problems.extend(files.headers[name].problems)
    _check_split(files, count)
    return files


def _check_split(files: GgufFiles, count: int) -> None:
    """Whether each file says that it is the one that its name says, and no tensor is missing."""
    for number, (name, header) in enumerate(files.headers.items()):
        file = str(files.sources[name].path)
        for key, wanted in (("split.no", number), ("split.count", count)):
            if header.fields.get(key) != wanted and not header.problems:
                found = show(header.fields.get(key))
                files.problems.append(Problem(file, key, found, str(wanted), DOWNLOAD_AGAIN))
    there = sum(len(header.tensors) for header in files.headers.values())
    stated = files.fields.get("split.tensors.count", there)
    if stated != there and not files.problems:
        first, found = str(next(iter(files.sources.values())).path), f"{there} tensors in all files"
        problem = Problem(first, "split.tensors.count", found, show(stated), DOWNLOAD_AGAIN)
        files.problems.append(problem)


def scan_gguf_checkpoint(source: str, path: Path) -> tuple[Checkpoint | None, list[Problem]]:
    """The checkpoint in a GGUF file, or everything that is wrong with it."""
    try:
        files = read_files(path)
    except OSError as error:
        return None, [Problem(str(path), None, str(error), "a readable file", DOWNLOAD_AGAIN)]
    headers = {
        name: Header(header.tensors, header.raw, []) for name, header in files.headers.items()
    }
    tensors = together(headers, files.problems)
    if files.problems:
        return None, files.problems
    meta = Metadata(files.fields, tensors, str(path), _architecture(files.fields))
    described = _describe(meta, files)
    decoder, names = described.decoder, described.names
    if decoder is None or not isinstance(names, Names):
        return None, described.problems
    decoder, names = _as_stored(decoder, names)
    kind = decoder.model_type
    own = {name: tensor for name, tensor in tensors.items() if name != FREQUENCIES}
    shards = Shards(files.sources, headers, renamed(own, kind))
    place = Place(str(path), str(path), _DISAGREE, lambda name: original(name, kind))
    problems: list[Problem] = []
    layout = Layout(place, shards, decoder, names, problems, [], has_values=True)
    weights = {name: _undone(one, meta, decoder) for name, one in layout.weights().items()}
    if problems:
        return None, problems
    checkpoint = Checkpoint(
        source=source,
        revision=None,
        folder=path,
        decoder=decoder,
        weights=weights,
        files=tuple(one.path for one in files.sources.values()),
        fingerprint=fingerprint(shards, b""),
        nbytes=sum(tensor.nbytes for tensor in own.values()),
        notes=(*layout.notes, *_tokenizer_note(files.fields, decoder)),
        unused_fields=(),
        unused_files=(),
    )
    return checkpoint, []


def _describe(meta: Metadata, files: GgufFiles) -> Description:
    """The decoder of the metadata, or everything that is wrong with them."""
    config = config_of(meta)
    if FREQUENCIES in meta.tensors and not meta.problems:
        config |= _frequencies(meta, files, config)
    if meta.problems:
        return Description(None, None, meta.problems)
    found = describe(config, meta.file)
    problems = [
        replace(one, hint=_DISAGREE) if one.hint == CONFIG_HINT else one for one in found.problems
    ]
    return replace(found, problems=problems)


def _tokenizer_note(fields: Mapping[str, Value], decoder: Decoder) -> Iterator[str]:
    tokens = fields.get(TOKENS)
    if isinstance(tokens, list) and len(tokens) > decoder.vocab_size:
        yield (
            f"the tokenizer has {len(tokens)} tokens, the vocabulary {decoder.vocab_size}: text "
            "that uses more is refused"
        )


def _architecture(fields: Mapping[str, Value]) -> str:
    found = fields.get(ARCHITECTURE)
    return found if isinstance(found, str) else ""


def _frequencies(meta: Metadata, files: GgufFiles, config: Mapping[str, Any]) -> dict[str, Any]:
    """What each frequency of RoPE is divided by, which transformers calls a longrope whose factors
    are the same at any length (Llama 3 computes them from four numbers)."""
    stored, pairs = meta.tensors[FREQUENCIES], config["head_dim"] // 2
    needed = f"F32 [{pairs}]"
    if meta.architecture != "llama" or "rope_scaling" in config:
        needed = "no such tensor beside another scaling"
    elif (stored.dtype, stored.shape) == ("F32", (pairs,)):
        raw = files.sources[stored.file.name].read(stored.offset, stored.nbytes)
        factors = list(struct.unpack(f"<{pairs}f", raw))
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        return {"rope_scaling": {**scaling, "factor": 1.0, "attention_factor": 1.0}}
    file, found = str(stored.file), stored.describe()
    meta.problems.append(Problem(file, FREQUENCIES, found, needed, _DISAGREE))
    return {}


def _as_stored(decoder: Decoder, names: Names) -> tuple[Decoder, Names]:
    """gpt-oss has gates and ups of experts in tensors of their own here, not row by row in turn."""
    if decoder.model_type != "gpt_oss":
        return decoder, names
    layers = (replace(one, feed=replace(one.feed, interleaved=False)) for one in decoder.layers)
    return replace(decoder, layers=tuple(layers)), names.with_(_GPT_OSS_EXPERTS)


def _undone(weight: Weight, meta: Metadata, decoder: Decoder) -> Weight:
    """What the converter did to a weight, to be undone where it is decoded."""
    storage = weight.storage
    if meta.architecture == "llama" and _TURNED.fullmatch(weight.name):
        head = decoder.layers[0].attention.head_dim
        if isinstance(storage, Ggml | Floats):
            return replace(weight, storage=replace(storage, turned=head))
    if decoder.norm.offset and weight.name.endswith("norm") and isinstance(storage, Floats):
        return replace(weight, storage=replace(storage, less=decoder.norm.offset))
    return weight
