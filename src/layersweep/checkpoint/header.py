"""The header of a safetensors file, believed only as far as it can be checked.

    u64 little-endian length | JSON {name: {dtype, shape, data_offsets}} | tensor bytes

Tensors must fill the rest of the file: no overlap, no hole, nothing left over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from layersweep.checkpoint.files import ByteSource, LocalFile
from layersweep.checkpoint.strict_json import LARGEST_JSON, UnusableJson, parse_json
from layersweep.problems import DOWNLOAD_AGAIN, TWICE, Problem, problems_error, show

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8},
}
FLOAT_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
LONGEST_HEADER = LARGEST_JSON  # a third of the format's own limit
MOST_DIMENSIONS = 64
LARGEST_NUMBER = 2**63  # of a dimension or an offset, as every reader of the format has it
NOT_SAFETENSORS = "needed is a safetensors file; " + DOWNLOAD_AGAIN


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in its file: `nbytes` bytes from `offset` (counted from byte 0)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def rows(self, start: int, count: int) -> StoredTensor:
        """Entries [start, start + count) of the first dimension: they lie together."""
        if not 0 <= start <= start + count <= self.shape[0]:
            raise ValueError(f"{self.name}: rows {start}..{start + count} of {self.shape}")
        step = self.nbytes // self.shape[0] if self.shape[0] else 0
        shape, offset = (count, *self.shape[1:]), self.offset + start * step
        return replace(self, shape=shape, offset=offset, nbytes=count * step)

    def as_bytes(self) -> StoredTensor:
        """The same bytes as U8 [nbytes]."""
        return replace(self, dtype="U8", shape=(self.nbytes,))

    def reshaped(self, shape: tuple[int, ...]) -> StoredTensor:
        """The same bytes under another shape of equal size."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.name}: {self.shape} as {shape}")
        return replace(self, shape=shape)

    def describe(self) -> str:
        """ "F16 [8, 4096]"."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """Tensors of one file in file order, the header's bytes, and what is wrong with them."""

    tensors: dict[str, StoredTensor]
    raw: bytes
    problems: list[Problem]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name. Raises CheckpointError, OSError."""
    header = scan_header(LocalFile(file, file.stat().st_size))
    if header.problems:
        raise problems_error(header.problems)
    return header.tensors


def scan_header(source: ByteSource) -> Header:
    """As `read_header`, from any source, with all problems collected instead of raised."""

    def broken(found: str, needed: str) -> Header:
        return Header({}, b"", [Problem(str(source.path), None, found, needed, NOT_SAFETENSORS)])

    if source.size < 8:
        return broken(f"{source.size} bytes", "at least the 8 bytes of a header length")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > LONGEST_HEADER:
        return broken(f"a header length of {length}", f"at most {LONGEST_HEADER}")
    if 8 + length > source.size:
        return broken(f"{source.size} bytes (truncated)", f"{8 + length} for the header alone")
    raw = source.read(8, length)
    if len(raw) != length:
        return broken(f"{len(raw)} header bytes", f"{length}")
    try:
        entries, repeated = parse_json(raw)
    except UnusableJson as error:
        return broken(f"a header that is {error}", "UTF-8 JSON")
    if not isinstance(entries, dict):
        return broken("a JSON header that is no object", "an object of tensors")
    scan = _Scan(source, 8 + length)
    for name in repeated:
        scan.problem(name, f"{TWICE[0]} in the header", TWICE[1])
    scan.metadata(entries.pop("__metadata__", {}))
    tensors = scan.tensors(entries)
    return Header(tensors, raw, scan.problems)


class _Scan:
    """Checks the entries of one header; owns the list of problems."""

    def __init__(self, source: ByteSource, start: int) -> None:
        self.file, self.start, self.end = source.path, start, source.size
        self.problems: list[Problem] = []

    def problem(self, tensor: str | None, found: str, needed: str) -> None:
        self.problems.append(Problem(str(self.file), tensor, found, needed, DOWNLOAD_AGAIN))

    def metadata(self, found: object) -> None:
        """Free text, which nothing here reads; the format allows strings alone, or null."""
        texts = isinstance(found, dict) and all(isinstance(text, str) for text in found.values())
        if not texts and found is not None:
            self.problem("__metadata__", show(found), "an object of strings, or null")

    def tensors(self, entries: dict[str, object]) -> dict[str, StoredTensor]:
        found = (self._tensor(name, entry) for name, entry in entries.items())
        ordered = sorted(
            (tensor for tensor in found if tensor is not None),
            key=lambda tensor: (tensor.offset, tensor.nbytes),
        )
        self._check_coverage(ordered, complete=len(ordered) == len(entries))
        return {tensor.name: tensor for tensor in ordered}

    def _tensor(self, name: str, entry: object) -> StoredTensor | None:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            self.problem(name, "an incomplete header entry", "dtype, shape and data_offsets")
            return None
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            self.problem(name, f"dtype {show(dtype)}", f"one of {', '.join(ITEM_BYTES)}")
            return None
        if not _are_counts(shape) or len(shape) > MOST_DIMENSIONS:
            self.problem(name, f"shape {show(shape)}", "a list of non-negative integers")
            return None
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self.problem(name, f"data_offsets {show(offsets)}", "two ascending byte positions")
            return None
        nbytes, needed = offsets[1] - offsets[0], math.prod(shape) * ITEM_BYTES[dtype]
        if nbytes != needed:
            self.problem(name, f"{nbytes} bytes", f"{needed} for {dtype} {shape}")
            return None
        return StoredTensor(name, self.file, dtype, tuple(shape), self.start + offsets[0], nbytes)

    def _check_coverage(self, ordered: list[StoredTensor], *, complete: bool) -> None:
        """Tensors in order of their offsets must touch. Holes only show when all are known."""
        position, previous = self.start, "the header"
        for tensor in ordered:
            if tensor.offset < position:
                self.problem(tensor.name, f"bytes that overlap {previous}", "bytes of its own")
            elif tensor.offset > position and complete:
                hole = tensor.offset - position
                self.problem(tensor.name, f"{hole} unused bytes before it", "no holes")
            position = max(position, tensor.offset + tensor.nbytes)
            previous = tensor.name
        if position > self.end:
            self.problem(previous, f"{self.end} bytes in the file (truncated)", f"{position}")
        elif position < self.end and complete:
            self.problem(None, f"{self.end} bytes", f"{position}: the end of {previous}")


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < LARGEST_NUMBER for item in value
    )
