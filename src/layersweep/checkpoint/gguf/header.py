"""The header of a GGUF file: typed metadata and a table of tensors, all of it checked.

    "GGUF" | version u32 | tensors u64 | keys u64 | keys: name, type, value ... |
    tensors: name, dimensions, type, offset ... | padding | data of the tensors, each aligned

What llama.cpp's loader refuses is refused. What it believes is checked: no count makes this
read or keep more than the file has, and metadata have LARGEST_JSON bytes at most.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from layersweep.checkpoint.files import ByteSource
from layersweep.checkpoint.header import LARGEST_NUMBER, StoredTensor
from layersweep.checkpoint.storage.ggml import TYPES, nbytes
from layersweep.checkpoint.strict_json import LARGEST_JSON, TOKENIZER_VALUES
from layersweep.problems import DOWNLOAD_AGAIN, Problem, show

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_KEYS, MOST_TENSORS = 2**14, 2**17
LONGEST_NAME = 63  # bytes of a tensor's name: ggml keeps 64 with the zero at its end
MOST_DIMENSIONS = 4
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
_CHUNK = 2**20
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Numbers by their type in the file; numpy spells them.
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_BY_NUMBER = {one.number: one for one in TYPES.values()}

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]


@dataclass(frozen=True)
class GgufHeader:
    """`raw`: all bytes before the data. `tensors`: in the order of the file, shapes as numpy and
    torch have them, the last dimension running fastest."""

    fields: dict[str, Value]
    tensors: dict[str, StoredTensor]
    raw: bytes
    problems: list[Problem]


class _Broken(Exception):
    """Nothing behind this place can be read."""

    def __init__(self, found: str, needed: str) -> None:
        super().__init__(found)
        self.found, self.needed = found, needed


def scan_gguf(source: ByteSource) -> GgufHeader:
    """The header, or all that is wrong with it. Raises OSError."""
    scan = _Scan(source)
    try:
        scan.read()
    except _Broken as broken:
        scan.problem(scan.where, broken.found, broken.needed)
    return GgufHeader(scan.fields, scan.tensors, scan.bytes.before(), scan.problems)


class _Bytes:
    """A file's first bytes, read as far as they are asked for. `at`: the next one."""

    def __init__(self, source: ByteSource) -> None:
        self.source, self.at = source, 0
        self.buffer = b""

    def before(self) -> bytes:
        return self.buffer[: self.at]

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self.reach(self.at + count)
        self.at += count
        return self.buffer[self.at - count : self.at]

    def reach(self, end: int) -> None:
        """Have the buffer hold all up to byte `end`."""
        if end <= len(self.buffer):
            return
        if end > self.source.size:
            raise _Broken(f"{self.source.size} bytes (truncated)", f"{end} for the header alone")
        if end > LARGEST_JSON:
            raise _Broken("more metadata", f"at most {LARGEST_JSON} bytes")
        wanted = min(self.source.size, max(end, 2 * len(self.buffer), _CHUNK), LARGEST_JSON)
        self.buffer += self.source.read(len(self.buffer), wanted - len(self.buffer))
        if end > len(self.buffer):
            raise _Broken(f"{len(self.buffer)} bytes (truncated)", f"{end} for the header alone")

    def number(self, code: str) -> int:
        found: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return found

    def string(self) -> str:
        return _text(self.take(self.number("Q")))

    def strings(self, count: int) -> list[str]:
        found, at, unpack = [], self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            self.reach(at + 8)
            start = at + 8
            at = start + unpack(self.buffer, at)[0]
            self.reach(at)
            found.append(_text(self.buffer[start:at]))
        self.at = at
        return found


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Broken(f"a string that is no UTF-8 ({error.reason})", "UTF-8") from None


class _Scan:
    """Reads one header from its start to its end; owns what was found and what is wrong."""

    def __init__(self, source: ByteSource) -> None:
        self.source, self.bytes = source, _Bytes(source)
        self.fields: dict[str, Value] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.problems: list[Problem] = []
        self.values = 0  # strings of arrays so far
        self.where: str | None = None  # the key or tensor that is read

    def problem(self, where: str | None, found: str, needed: str) -> None:
        file = str(self.source.path)
        self.problems.append(Problem(file, where, found, needed, DOWNLOAD_AGAIN))

    def read(self) -> None:
        magic = self.bytes.take(4) if self.source.size >= 4 else b""
        if magic != MAGIC:
            raise _Broken(f"a file that begins with {show(magic)}", f"a GGUF file, {show(MAGIC)}")
        self._version(self.bytes.number("I"))
        tensors, keys = self.bytes.number("Q"), self.bytes.number("Q")
        for what, count, most in (("tensors", tensors, MOST_TENSORS), ("keys", keys, MOST_KEYS)):
            if count > most:
                raise _Broken(f"{count} {what}", f"at most {most}")
        for index in range(keys):
            self._key(index)
        alignment = self._alignment()
        entries = [self._entry(index) for index in range(tensors)]
        self.bytes.at += -self.bytes.at % alignment
        self._place(entries, alignment)

    def _version(self, version: int) -> None:
        if version & 0xFFFF == 0 and version:
            raise _Broken(f"version {version}, a big-endian file", "a little-endian file")
        if version not in VERSIONS:
            raise _Broken(f"version {version}", f"version {' or '.join(map(str, VERSIONS))}")

    def _key(self, index: int) -> None:
        self.where = f"key {index}"
        name = self.bytes.string()
        self.where = name or self.where
        kind = self.bytes.number("I")
        if name in self.fields:
            raise _Broken("the same key twice", "every key once")
        self.fields[name] = self._value(kind)

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.bytes.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise _Broken(f"a value of type {kind}", "type 0 to 12")
        return self._numbers(kind, 1)[0]

    def _array(self) -> Value:
        kind, count = self.bytes.number("I"), self.bytes.number("Q")
        if kind == _STRING:
            self.values += count
            if self.values > TOKENIZER_VALUES:
                raise _Broken(f"{self.values} strings in arrays", f"at most {TOKENIZER_VALUES}")
            return self.bytes.strings(count)
        if kind not in _NUMBERS:
            raise _Broken(f"an array of type {kind}", "numbers, booleans or strings")
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> list[int] | list[float] | list[bool]:
        dtype = np.dtype(_NUMBERS[kind])
        found = np.frombuffer(self.bytes.take(count * dtype.itemsize), dtype)
        if kind != _BOOL:
            return found.tolist()  # type: ignore[no-any-return]
        if (found > 1).any():
            raise _Broken(f"a boolean of {found.max()}", "0 or 1")
        return [bool(one) for one in found.tolist()]

    def _alignment(self) -> int:
        found = self.fields.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        if type(found) is not int or not 0 < found < 2**31 or found & (found - 1):
            self.where = ALIGNMENT
            raise _Broken(show(found), "a power of two")
        return found

    def _entry(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        """(name, dimensions, type, offset) of a tensor."""
        self.where = f"tensor {index}"
        name = self.bytes.string()
        self.where = name or self.where
        if len(name.encode()) > LONGEST_NAME:
            raise _Broken(f"a name of {len(name.encode())} bytes", f"at most {LONGEST_NAME}")
        dimensions = self.bytes.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Broken(f"{dimensions} dimensions", f"1 to {MOST_DIMENSIONS}")
        sizes = tuple(self.bytes.number("Q") for _ in range(dimensions))
        return name, sizes, self.bytes.number("I"), self.bytes.number("Q")

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> None:
        """Tensors lie one after the other in the order of the table, each aligned."""
        start = end = self.bytes.at
        for name, sizes, number, offset in entries:
            kind = _BY_NUMBER.get(number)
            if kind is None:
                return self.problem(name, f"type {number}", "a type of ggml")
            if any(size >= LARGEST_NUMBER for size in sizes) or math.prod(sizes) >= LARGEST_NUMBER:
                return self.problem(name, f"dimensions {list(sizes)}", "fewer than 2^63 elements")
            if sizes[0] % kind.elements:
                needed = f"a multiple of {kind.elements} for {kind.name}"
                return self.problem(name, f"rows of {sizes[0]}", needed)
            if name in self.tensors:
                return self.problem(name, "the same tensor twice", "every tensor once")
            if start + offset != end:
                return self.problem(name, f"offset {offset}", f"{end - start}")
            shape = sizes[::-1]
            size = nbytes(kind, shape)
            found = StoredTensor(name, self.source.path, kind.name, shape, end, size)
            if end + size > self.source.size:
                found_bytes = f"{self.source.size} bytes in the file (truncated)"
                return self.problem(name, found_bytes, f"{end + size}")
            self.tensors[name] = found
            end += size + -size % alignment
        return None
