"""Writes safetensors files at the speed of the disk: bytes go from where they lie to the file."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layersweep.checkpoint.header import ITEM_BYTES
from layersweep.errors import InputError
from layersweep.units import format_bytes

REPORT_EVERY_S = 0.2
WRITE_BUFFER = 2**20  # small tensors are gathered; larger pieces go past it uncopied
DTYPE_NAMES = {
    torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip

Pieces = Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write. `like` has its dtype and shape, `pieces` makes its bytes when called."""

    name: str
    like: Tensor
    pieces: Pieces

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> PlannedTensor:
        return cls(name, tensor, lambda: iter((bytes_of(tensor),)))


def cut_shards(tensors: Iterable[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    """Consecutive tensors per file, as many as `shard_bytes` hold."""
    shards: list[list[PlannedTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if held and held + tensor.like.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.like.nbytes
    return shards


def write_shards(
    folder: Path, files: Mapping[str, list[PlannedTensor]], threads: int,
    report: Callable[[int], None],
) -> None:  # fmt: skip
    """All files, several at once; one writer each, since the kernel locks a file to write it."""
    stop = threading.Event()
    written = dict.fromkeys(files, 0)

    def write(name: str) -> None:
        if stop.is_set():
            return
        # "x": nobody else's file; the head first and no gaps, so a part of it reads as truncated
        with (folder / name).open("xb", buffering=WRITE_BUFFER) as file:
            # the order of safetensors' own writer: by alignment, then by name
            shard = sorted(files[name], key=lambda item: (-item.like.itemsize, item.name))
            rows = ((item.name, DTYPE_NAMES[item.like.dtype], item.like.shape) for item in shard)
            file.write(header_bytes(rows))
            for piece in (piece for tensor in shard for piece in tensor.pieces()):
                if stop.is_set():
                    return
                written[name] += file.write(piece)

    with ThreadPoolExecutor(min(threads, len(files))) as pool:
        running = {pool.submit(write, name) for name in files}
        try:
            while running:
                done, running = wait(running, REPORT_EVERY_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                report(sum(written.values()))
        finally:
            stop.set()


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int]]], size: int = 0) -> bytes:
    """Length and JSON of a safetensors file: name, dtype, shape of its tensors in file order.

    Padded to a multiple of 8 bytes, or to `size` of them.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * ((size - 8 - len(head)) if size else -len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, where they lie."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def make_folder(folder: Path, needed: int, hint: str) -> None:
    """Make an empty folder for `needed` bytes; `hint` says what to do where the disk is too small.

    Raises InputError for a folder in use, one that cannot be made, or a disk that is too small.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: found a file, needed a folder", hint="name another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{folder}: found files in it, needed an empty folder",
            hint="name a folder that does not exist yet",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as failure:
        raise InputError(
            f"{folder}: cannot be made ({failure.strerror})",
            hint="name a folder that you may write to",
        ) from failure
    if free < needed:
        raise InputError(
            f"{folder}: found {format_bytes(free)} of free disk, needed {format_bytes(needed)}",
            hint=hint,
        )
