"""Floats, and NF4 and FP4 as bitsandbytes writes them: which of them a tensor is.

A weight is quantized iff its dtype and shape are packed AND its quant_state JSON is there; it is
float iff it has a floating dtype, the config's shape and no companion. Anything else is a problem
that names both facts. Names and flags decide nothing. One exception is read and announced: packed
with plain absmax and a quant_map equal to the NF4 table, but no JSON.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.floats import FLOATS, Floats
from layersweep.checkpoint.storage.four_bit import FourBit, Nested
from layersweep.checkpoint.storage.storage import Headers, Storage
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.checkpoint.tables import CODES
from layersweep.problems import TWICE, show

Kind = Literal["nf4", "fp4"]
KINDS: tuple[Kind, ...] = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"
SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SUFFIXES = (*SCALES, *(STATE + kind for kind in KINDS))
STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
POSSIBLE_BLOCKS = tuple(1 << power for power in range(1, 21))
LONGEST_STATE = 1 << 16
# Not needed for decoding, but in a whole file one of these.
KNOWN_DTYPES = {"dtype": ("float16", "bfloat16", "float32"), "nested_dtype": ("float32",)}

Tensors = Mapping[str, StoredTensor]


def base(tensor: StoredTensor) -> str | None:
    return tensor.name


def companions(base: str) -> tuple[str, ...]:
    return tuple(f"{base}.{suffix}" for suffix in SUFFIXES)


def match(headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
    """Floats, or a packed weight with its scales."""
    data = headers.tensors[base]
    named = ((suffix, headers.tensors.get(f"{base}.{suffix}")) for suffix in SUFFIXES)
    there = {suffix: tensor for suffix, tensor in named if tensor is not None}
    state = next((kind for kind in KINDS if STATE + kind in there), None)
    row = len(shape) == 1 and data.shape == (1, *shape)  # a vector may be stored as one
    float_shaped = data.dtype in FLOATS and (data.shape == shape or row)
    if float_shaped and not there:
        return Floats(data)
    matching = _Matching(headers)
    if not is_packed(data, shape):
        matching.not_packed(data, shape, there, float_shaped)
        return None
    before = len(headers.problems)
    if state is None:
        found = matching.from_counts(data, shape, there)
    else:
        found = matching.from_state(data, shape, there, state)
    return found if len(headers.problems) == before else None


@dataclass(frozen=True)
class _Matching:
    """Makes sense of a packed weight and its companions."""

    headers: Headers

    def _problem(self, tensor: StoredTensor, found: str, needed: str, hint: str = "") -> None:
        self.headers.problem(tensor, found, needed, hint)

    def not_packed(
        self, data: StoredTensor, shape: tuple[int, ...], companions: Tensors, float_shaped: bool
    ) -> None:
        packed = f"packed U8 [{packed_bytes(shape)}, 1] with quant_state"
        if float_shaped:
            found = f"{data.describe()} and its 4-bit companions {', '.join(companions)}"
            needed = f"float {list(shape)} without companions, or {packed}"
            hint = "the file says float and quantized at once; quantize the model again"
            self._problem(data, found, needed, hint)
            return
        found = data.describe() + (" and 4-bit companions" if companions else "")
        hint = "config.json and the tensors disagree; take both from the same model"
        self._problem(data, found, f"float {list(shape)} or {packed}", hint)

    def from_state(
        self, data: StoredTensor, shape: tuple[int, ...], companions: Tensors, kind: Kind
    ) -> FourBit | None:
        missing = [suffix for suffix in ("absmax", "quant_map") if suffix not in companions]
        other = next((item for item in KINDS if item != kind and STATE + item in companions), None)
        if missing:
            needed = f"{data.name}.{missing[0]} in one of the shards"
            self._problem(data, f"4-bit data without {' and '.join(missing)}", needed)
            return None
        if other is not None:
            self._problem(data, f"quant_state of both {kind} and {other}", "one of them")
            return None
        self._check_code(companions["quant_map"], kind)
        state = self._read_state(companions[STATE + kind], kind, shape)
        if state is None:
            return None
        blocksize = state.blocksize
        if blocksize is None:  # headers alone: the count of scales must do
            blocksize = self._blocksize_from_counts(companions["absmax"], shape)
            if blocksize is None:
                return None
        blocks = -(-math.prod(shape) // blocksize)
        nested = self._nested(data, companions, state, blocks)
        scale_dtype = "U8" if state.nested(companions) else "F32"
        self.headers.expect(companions["absmax"], scale_dtype, blocks)
        rest = companions[STATE + kind].nbytes + companions["quant_map"].nbytes
        return FourBit(kind, data, blocksize, companions["absmax"], nested, rest)

    def _nested(
        self, data: StoredTensor, companions: Tensors, state: _State, blocks: int
    ) -> Nested | None:
        present = [suffix for suffix in SCALES[2:] if suffix in companions]
        if state.blocksize is not None and state.offset is None and present:
            needed = "nested_blocksize and nested_offset in quant_state"
            self._problem(data, f"{' and '.join(present)}", needed)
            return None
        if not state.nested(companions):
            return None
        missing = [suffix for suffix in SCALES[2:] if suffix not in companions]
        if missing:
            needed = f"{data.name}.{missing[0]} in one of the shards"
            self._problem(data, f"nested scales without {' and '.join(missing)}", needed)
            return None
        size = state.nested_blocksize or 256
        self.headers.expect(companions["nested_absmax"], "F32", -(-blocks // size))
        self.headers.expect(companions["nested_quant_map"], "F32", 256)
        absmax, quant_map = companions["nested_absmax"], companions["nested_quant_map"]
        return Nested(absmax, quant_map, size, state.offset or 0.0)

    def from_counts(
        self, data: StoredTensor, shape: tuple[int, ...], companions: Tensors
    ) -> FourBit | None:
        """Packed without quant_state: readable if absmax is plain and the table is NF4's."""
        needed = f"{data.name}.{STATE}nf4 in one of the shards"
        if not {"absmax", "quant_map"} <= set(companions):
            found = f"{data.describe()} (packed) without quant_state"
            self._problem(data, found, needed)
            return None
        if "nested_absmax" in companions or companions["absmax"].dtype != "F32":
            found = "nested scales without quant_state, which holds their offset"
            self._problem(data, found, needed)
            return None
        self._check_code(companions["quant_map"], "nf4")
        blocksize = self._blocksize_from_counts(companions["absmax"], shape)
        if blocksize is None:
            return None
        self.headers.expect(companions["absmax"], "F32", -(-math.prod(shape) // blocksize))
        self.headers.note(
            "packed without quant_state, read as NF4 because quant_map is the NF4 table", data
        )
        rest = companions["quant_map"].nbytes
        return FourBit("nf4", data, blocksize, companions["absmax"], None, rest)

    def _blocksize_from_counts(self, absmax: StoredTensor, shape: tuple[int, ...]) -> int | None:
        count, scales = math.prod(shape), math.prod(absmax.shape)
        fitting = [size for size in BLOCKSIZES if -(-count // size) == scales]
        if not fitting:
            needed = f"one scale per 32 to 4096 of the {count} elements"
            self._problem(absmax, f"{scales} scales", needed)
            return None
        return max(fitting)  # several fit only where all make one block of everything

    def _check_code(self, quant_map: StoredTensor, kind: Kind) -> None:
        if not self.headers.expect(quant_map, "F32", 16) or self.headers.read is None:
            return
        values = struct.unpack("<16f", self.headers.read(quant_map))
        table = struct.unpack("<16f", struct.pack("<16f", *CODES[kind]))
        if values != table:
            differing = next(index for index in range(16) if values[index] != table[index])
            found = f"{values[differing]} at index {differing}"
            self._problem(quant_map, found, f"{table[differing]}, the {kind.upper()} table")

    def _read_state(
        self, tensor: StoredTensor, kind: Kind, shape: tuple[int, ...]
    ) -> _State | None:
        if tensor.dtype != "U8" or tensor.nbytes > LONGEST_STATE:
            self._problem(tensor, tensor.describe(), "a few hundred bytes of JSON as U8")
            return None
        if self.headers.read is None:
            return _State(None, None, None)
        try:
            fields, repeated = parse_json(self.headers.read(tensor))
        except UnusableJson as error:
            self._problem(tensor, str(error), "UTF-8 JSON of quant_state")
            return None
        if repeated:
            self._problem(tensor, f"{repeated[0]}: {TWICE[0]}", TWICE[1])
            return None
        if not isinstance(fields, dict):
            self._problem(tensor, "JSON that is no object", "an object")
            return None
        return self._parse_state(tensor, fields, kind, shape)

    def _parse_state(
        self, tensor: StoredTensor, fields: Mapping[str, object], kind: Kind, shape: tuple[int, ...]
    ) -> _State | None:
        before = len(self.headers.problems)
        if fields.get("quant_type", kind) != kind:
            self._problem(tensor, f"quant_type {show(fields['quant_type'])}", repr(kind))
        if fields.get("shape", list(shape)) != list(shape):
            needed = f"{list(shape)}, the shape in config.json"
            self._problem(tensor, f"shape {show(fields['shape'])}", needed)
        for field, known in KNOWN_DTYPES.items():
            if fields.get(field, known[0]) not in known:
                found = f"{field} {show(fields[field])}"
                self._problem(tensor, found, f"one of {', '.join(known)}")
        blocksize, inner = fields.get("blocksize"), fields.get("nested_blocksize")
        for field, value in (("blocksize", blocksize), ("nested_blocksize", inner)):
            if value is None and field == "nested_blocksize":
                continue
            if type(value) is not int or value not in POSSIBLE_BLOCKS:
                self._problem(tensor, f"{field} {show(value)}", "a power of two from 2 to 2^20")
        offset = fields.get("nested_offset")
        if (inner is None) != (offset is None):
            found = "nested_blocksize" if offset is None else "nested_offset"
            self._problem(tensor, f"{found} alone", "nested_blocksize and nested_offset")
        elif offset is not None and not _is_finite(offset):
            self._problem(tensor, f"nested_offset {show(offset)}", "a finite number")
        if len(self.headers.problems) != before:
            return None
        assert isinstance(blocksize, int)
        number = float(offset) if isinstance(offset, int | float) else None
        return _State(blocksize, inner if isinstance(inner, int) else None, number)


@dataclass(frozen=True)
class _State:
    """quant_state's numbers; blocksize is None where only headers were read."""

    blocksize: int | None
    nested_blocksize: int | None
    offset: float | None

    def nested(self, companions: Tensors) -> bool:
        if self.blocksize is None:
            return companions["absmax"].dtype == "U8" or "nested_absmax" in companions
        return self.offset is not None


def is_packed(data: StoredTensor, shape: tuple[int, ...]) -> bool:
    """Two elements per byte, under any storage dtype, as a column, a row or flat."""
    long = [size for size in data.shape if size != 1]
    return (
        data.dtype in STORAGE
        and data.nbytes == packed_bytes(shape)
        and len(long) <= 1
        and 1 <= len(data.shape) <= 2
        and data.shape != shape
    )


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a 4-bit weight: two elements each, the last one padded."""
    return (math.prod(shape) + 1) // 2


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e38 < value < 1e38  # also false for NaN
