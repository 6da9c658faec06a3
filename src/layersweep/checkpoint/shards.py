"""The safetensors files of a folder and the tensors in all of them together."""

from __future__ import annotations

from dataclasses import dataclass

from layersweep.checkpoint.files import ByteSource, Folder, is_plain_name, read_small
from layersweep.checkpoint.header import Header, StoredTensor, scan_header
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.problems import DOWNLOAD_AGAIN, TWICE, FileProblem, Problem, show

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
CONVERT = "convert the model to safetensors, or take a revision that has them"


@dataclass(frozen=True)
class Shards:
    """Opened shards in name order, their headers, and every tensor by name."""

    sources: dict[str, ByteSource]
    headers: dict[str, Header]
    tensors: dict[str, StoredTensor]


def open_shards(folder: Folder, problems: list[Problem], notes: list[str]) -> Shards:
    """All shards that can be opened; what is wrong is appended to `problems`."""
    weight_map = read_weight_map(folder, problems)
    names = sorted(set(weight_map.values())) if weight_map else _unindexed(folder, problems)
    sources: dict[str, ByteSource] = {}
    headers: dict[str, Header] = {}
    for name in names:
        try:
            sources[name] = folder.open(name)
            headers[name] = scan_header(sources[name])
        except FileProblem as error:
            problems.append(error.problem)
        except OSError as error:
            path = f"{folder.label}/{name}"
            problems.append(Problem(path, None, str(error), "a readable file", DOWNLOAD_AGAIN))
    for header in headers.values():
        problems.extend(header.problems)
    tensors = together(headers, problems)
    _check_index(folder, weight_map, headers, problems, notes)
    return Shards(sources, headers, tensors)


def read_weight_map(folder: Folder, problems: list[Problem]) -> dict[str, str]:
    """Tensor name -> shard of the index; empty where there is no index, or one file holds all."""
    if INDEX not in folder.names() or SINGLE in folder.names():
        return {}
    where = f"{folder.label}/{INDEX}"
    try:
        index, repeated = parse_json(read_small(folder, INDEX))
    except FileProblem as error:
        problems.append(error.problem)
        return {}
    except UnusableJson as error:
        problems.append(Problem(where, None, str(error), "a JSON object", DOWNLOAD_AGAIN))
        return {}
    problems.extend(Problem(where, key, *TWICE, DOWNLOAD_AGAIN) for key in repeated)
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict) or not entries:
        found = "no weight_map" if entries is None else "an unusable weight_map"
        needed = "a weight_map of tensors to shards"
        problems.append(Problem(where, None, found, needed, DOWNLOAD_AGAIN))
        return {}
    weight_map: dict[str, str] = {}
    refused: set[str] = set()
    for tensor, shard in entries.items():
        if isinstance(shard, str) and is_plain_name(shard) and shard.endswith(".safetensors"):
            weight_map[tensor] = shard
        elif show(shard) not in refused:
            refused.add(show(shard))
            needed = "the plain name of a .safetensors file in the same folder"
            hint = "the index leads out of the folder or to a pickle: do not use this checkpoint"
            problems.append(Problem(where, tensor, f"shard {show(shard)}", needed, hint))
    return weight_map


def _unindexed(folder: Folder, problems: list[Problem]) -> list[str]:
    names = folder.names()
    if SINGLE in names:
        return [SINGLE]
    if INDEX in names:
        return []  # unusable, and reported
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) == 1:
        return found
    if found:
        problem = Problem(
            *(folder.label, None, f"{len(found)} safetensors files without an index", INDEX),
            "download the index too; without it a missing shard would go unnoticed",
        )
    elif pickles := sorted(name for name in names if name.endswith(PICKLES)):
        found_text = f"only {pickles[0]}, a format that can run code when loaded"
        problem = Problem(folder.label, None, found_text, "*.safetensors", CONVERT)
    else:
        hint = "give the folder that holds config.json and the .safetensors files"
        problem = Problem(folder.label, None, "no safetensors file", f"{SINGLE} or {INDEX}", hint)
    problems.append(problem)
    return []


def together(headers: dict[str, Header], problems: list[Problem]) -> dict[str, StoredTensor]:
    """Every tensor of all files by name; a name that two have is a problem."""
    tensors: dict[str, StoredTensor] = {}
    for header in headers.values():
        for name, tensor in header.tensors.items():
            if name in tensors:
                found = f"the same tensor as in {tensors[name].file.name}"
                hint = "shards of two downloads are mixed; start from an empty folder"
                problems.append(Problem(str(tensor.file), name, found, "it once", hint))
            else:
                tensors[name] = tensor
    return tensors


def _check_index(
    folder: Folder,
    weight_map: dict[str, str],
    headers: dict[str, Header],
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Every indexed tensor must lie in the shard that the index names, if that one is readable."""
    for tensor, shard in weight_map.items():
        header = headers.get(shard)
        if header is None or header.problems or tensor in header.tensors:
            continue
        where = f"{folder.label}/{shard}"
        needed = f"the tensor that {INDEX} says is here"
        problems.append(Problem(where, tensor, "no such tensor", needed, DOWNLOAD_AGAIN))
    if SINGLE in folder.names() and INDEX in folder.names():
        notes.append(f"{SINGLE} and {INDEX} are both there: {SINGLE} is read")
