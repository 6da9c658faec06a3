"""What damages a checkpoint: small functions that change one file of a valid, tiny one in place.

Nothing here uses layersweep, so that a mistake in the package cannot hide in its test data.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_builders import STATE, tiny_checkpoint

Damage = Callable[[Path], None]

SINGLE, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"  # plain scales
FUSED = "model.layers.1.mlp.experts.gate_up_proj"  # in the base whose layout is "fused"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
EXECUTED = "executed"  # what hostile code would write into its folder

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
TEXT = "".join(
    f"Line {number}: the quick brown fox, number {number * 7919 % 1000}, jumps over a lazy dog.\n"
    for number in range(60)
)


# --- a safetensors file in parts -----------------------------------------------------------------


@dataclass
class Shard:
    """A safetensors file whose header and data can be changed apart from each other."""

    header: dict[str, Any]
    data: bytes

    @classmethod
    def read(cls, path: Path) -> Shard:
        return cls.parse(path.read_bytes())

    @classmethod
    def parse(cls, raw: bytes) -> Shard:
        start = 8 + int.from_bytes(raw[:8], "little")
        return cls(json.loads(raw[8:start]), raw[start:])

    def encode(self) -> bytes:
        raw = json.dumps(self.header).encode()
        return len(raw).to_bytes(8, "little") + raw + self.data

    def tensor(self, name: str) -> bytes:
        start, stop = self.header[name]["data_offsets"]
        return self.data[start:stop]

    def replace(self, name: str, content: bytes, dtype: str, shape: list[int]) -> None:
        """Another tensor in the place of one; those behind it move."""
        start, stop = self.header[name]["data_offsets"]
        self.data = self.data[:start] + content + self.data[stop:]
        moved = len(content) - (stop - start)
        for entry in self.header.values():
            offsets = entry.get("data_offsets")
            if offsets and offsets[0] >= stop:
                entry["data_offsets"] = [place + moved for place in offsets]
        self.header[name] = entry_of(dtype, shape, start, start + len(content))

    def remove(self, name: str) -> None:
        self.replace(name, b"", "U8", [0])
        del self.header[name]


def entry_of(dtype: object, shape: object, *offsets: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


# --- the valid checkpoints -----------------------------------------------------------------------


@functools.cache
def base(shards: int, layout: str = "per_expert") -> Path:
    """A tiny NF4 Mixtral with a tokenizer: nested scales, but plain ones for one weight."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_checkpoint(folder, layout, shards=shards)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"layersweep_synthetic": True, "max_position_embeddings": 2048}
    (folder / CONFIG).write_text(json.dumps(config))
    if shards == 1:
        plain_scales(folder)
    write_tokenizer(folder)
    return folder


def plain_scales(folder: Path) -> None:
    """K_PROJ's scales expanded to float32, as they are stored without double quantization."""
    shard = Shard.read(folder / SINGLE)
    state = json.loads(shard.tensor(K_PROJ + STATE))
    codes = shard.tensor(f"{K_PROJ}.absmax")
    outer = struct.unpack("<f", shard.tensor(f"{K_PROJ}.nested_absmax"))[0]
    table = struct.unpack("<256f", shard.tensor(f"{K_PROJ}.nested_quant_map"))
    scales = [abs(table[code] * outer + state["nested_offset"]) for code in codes]
    shard.replace(f"{K_PROJ}.absmax", floats(scales), "F32", [len(scales)])
    shard.remove(f"{K_PROJ}.nested_absmax")
    shard.remove(f"{K_PROJ}.nested_quant_map")
    kept = {key: value for key, value in state.items() if not key.startswith("nested")}
    content = json.dumps(kept).encode()
    shard.replace(K_PROJ + STATE, content, "U8", [len(content)])
    (folder / SINGLE).write_bytes(shard.encode())


def write_tokenizer(folder: Path) -> None:
    """One token for every printable character, so that any text has ids below 128."""
    special = ["<unk>", "<s>", "</s>"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocab = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}
    added = [{"id": i, "content": t, "special": True, **flags} for i, t in enumerate(special)]
    empty = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": added, **empty, "model": model}
    (folder / TOKENIZER).write_text(json.dumps(content))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings))


# --- damages -------------------------------------------------------------------------------------


def floats(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def shard(change: Callable[[Shard], object], name: str = SINGLE) -> Damage:
    def damage(folder: Path) -> None:
        opened = Shard.read(folder / name)
        change(opened)
        (folder / name).write_bytes(opened.encode())

    return damage


def entry(tensor: str, **fields: object) -> Damage:
    """Fields of one tensor's header entry."""
    return shard(lambda opened: opened.header[tensor].update(fields))


def added(tensor: str, value: object) -> Damage:
    """One more entry of the header."""
    return shard(lambda opened: opened.header.update({tensor: value}))


def header_text(change: Callable[[bytes], bytes]) -> Damage:
    """The header's bytes, with the length field kept right."""

    def damage(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        changed = change(raw[8:start])
        length = len(changed).to_bytes(8, "little")
        (folder / SINGLE).write_bytes(length + changed + raw[start:])

    return damage


def length_field(value: int) -> Damage:
    def damage(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(value.to_bytes(8, "little") + raw[8:])

    return damage


def content(name: str, raw: bytes | str) -> Damage:
    encoded = raw.encode() if isinstance(raw, str) else raw
    return lambda folder: (folder / name).write_bytes(encoded) and None


def text(name: str, old: str, new: str) -> Damage:
    """Part of a JSON file's text, for what json.dumps cannot write."""

    def damage(folder: Path) -> None:
        before = (folder / name).read_text()
        assert old in before
        (folder / name).write_text(before.replace(old, new, 1))

    return damage


def json_file(name: str, **fields: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | fields))

    return damage


def config(**fields: object) -> Damage:
    return json_file(CONFIG, **fields)


def without(name: str, field: str) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        del fields[field]
        (folder / name).write_text(json.dumps(fields))

    return damage


def mapped(tensor: str, target: object) -> Damage:
    """An entry of the index."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][tensor] = target
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def state(tensor: str = Q_PROJ, drop: str = "", **fields: object) -> Damage:
    """Fields of a weight's quant_state JSON."""

    def change(opened: Shard) -> None:
        found = json.loads(opened.tensor(tensor + STATE)) | fields
        found.pop(drop, None)
        raw = json.dumps(found).encode()
        opened.replace(tensor + STATE, raw, "U8", [len(raw)])

    return shard(change)


def state_text(raw: bytes) -> Damage:
    return tensor_of(Q_PROJ + STATE, raw, "U8", [len(raw)])


def tensor_of(name: str, raw: bytes, dtype: str, shape: list[int]) -> Damage:
    return shard(lambda opened: opened.replace(name, raw, dtype, shape))


def value(tensor: str, number: float) -> Damage:
    """The second float32 of a tensor."""

    def change(opened: Shard) -> None:
        numbers = bytearray(opened.tensor(tensor))
        at = 4 if len(numbers) > 4 else 0
        numbers[at : at + 4] = floats([number])
        opened.replace(tensor, bytes(numbers), "F32", [len(numbers) // 4])

    return shard(change)


def gone(tensor: str) -> Damage:
    return shard(lambda opened: opened.remove(tensor))


def linked(name: str, target: Callable[[Path], Path | str]) -> Damage:
    """A file becomes a link; what it held goes to a file beside the folder."""

    def damage(folder: Path) -> None:
        if (folder / name).exists():
            (folder / name).rename(folder.parent / f"{folder.name}-{name}")
        (folder / name).symlink_to(target(folder))

    return damage


def outside(name: str) -> Damage:
    return linked(name, lambda folder: folder.parent / f"{folder.name}-{name}")


def unlinked(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def enlarged(name: str, size: int) -> Damage:
    """As many zero bytes behind a file as make it `size`; they take no room on the disk."""
    return lambda folder: os.truncate(folder / name, size)


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def pickle_only(folder: Path) -> None:
    (folder / SINGLE).unlink()
    write_bomb(folder / "pytorch_model.bin", folder)


def write_bomb(path: Path, folder: Path) -> None:
    """A pickle that writes a file when it is loaded."""
    path.write_bytes(pickle.dumps(_Bomb(str(folder / EXECUTED))))


class _Bomb:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.target, "w"))


def remote_code(folder: Path) -> None:
    """modeling_x.py and tokenization_x.py, named in both configs; each writes a file."""
    code = f"open({str(folder / EXECUTED)!r}, 'w')\nclass X: pass\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py"):
        (folder / name).write_text(code)
    models = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    tokenizers = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    config(auto_map=models | tokenizers)(folder)
    json_file(TOKENIZER_CONFIG, auto_map=tokenizers, tokenizer_class="X")(folder)


def pre_tokenized(pattern: str) -> Damage:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return json_file(TOKENIZER, pre_tokenizer=split | {"invert": False})


def chat(template: str) -> Damage:
    return json_file(TOKENIZER_CONFIG, chat_template=template)


def tokenizer_part(**fields: object) -> Damage:
    return json_file(TOKENIZER, **fields)


def model_part(**fields: object) -> Damage:
    """Fields of the `model` in tokenizer.json."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / TOKENIZER).read_text())
        found["model"] |= fields
        (folder / TOKENIZER).write_text(json.dumps(found))

    return damage


# 12 MB of JSON that would take 320 MB of memory
EMPTY_LISTS = "[" + "[]," * 4_000_000 + "[]]"


def nested(depth: int, inner: str = "1") -> str:
    return "[" * depth + inner + "]" * depth
