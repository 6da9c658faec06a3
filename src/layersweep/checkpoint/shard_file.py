"""A safetensors file that several threads write at once, in any order.

    [ room for the header | tensors of known size | tensors whose size comes with their bytes ]

Its header is written last. Until then its length reads as 0, so no reader opens the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from layersweep.checkpoint.header import ITEM_BYTES, StoredTensor
from layersweep.checkpoint.writer import header_bytes

LONGEST_LATE = 1 << 12  # bytes of a tensor whose size comes late

Row = tuple[str, str, tuple[int, ...]]  # of a header: name, dtype, shape


class ShardFile:
    """`tensors` are rows of its header. `late`: names of U8 [n] tensors.

    The layout depends on the names and shapes alone: safetensors' own order, by alignment and
    then by name, and the late ones at the end by name.
    """

    def __init__(self, path: Path, tensors: Iterable[Row], late: Iterable[str]) -> None:
        """Raises OSError, FileExistsError too: it never writes to somebody's file."""
        ordered = sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor[1]], tensor[0]))
        self.path, self.late = path, sorted(late)
        longest = [*ordered, *((name, "U8", (LONGEST_LATE,)) for name in self.late)]
        self.room = len(header_bytes(longest))  # with offsets of as many digits at least
        self.tensors: dict[str, StoredTensor] = {}
        self.end = self.room
        for name, dtype, shape in ordered:
            self._place(name, dtype, shape)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, name: str, data: memoryview, first_byte: int = 0) -> None:
        """`data` into tensor `name`, from that byte of it on."""
        tensor = self.tensors[name]
        assert first_byte + data.nbytes <= tensor.nbytes, f"{name}: too many bytes"
        self._write(data, tensor.offset + first_byte)

    def finish(self, late: Mapping[str, bytes]) -> None:
        """The late tensors, and the header that makes a readable file of all."""
        for name in self.late:
            data = late[name]
            assert len(data) <= LONGEST_LATE, f"{name}: {len(data)} bytes"
            self._place(name, "U8", (len(data),))
            self.write(name, memoryview(data))
        rows = ((name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items())
        header = header_bytes(rows, self.room)
        assert len(header) == self.room, f"{self.path}: the header outgrew its room"
        self._write(memoryview(header), 0)
        self.close()

    def close(self) -> None:
        """Without a header, if it is not finished."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        self.tensors[name] = StoredTensor(name, self.path, dtype, shape, self.end, nbytes)
        self.end += nbytes

    def _write(self, data: memoryview, offset: int) -> None:
        """All of it: one call writes 2 GiB at most."""
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written
