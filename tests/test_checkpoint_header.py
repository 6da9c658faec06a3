"""Headers of safetensors files: what is accepted, and every way in which one can lie."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from layersweep.checkpoint import StoredTensor, read_header
from layersweep.checkpoint.header import ITEM_BYTES
from layersweep.errors import CheckpointError


def written(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


A, B = entry("F32", [2, 2], 0, 16), entry("U8", [3], 16, 19)


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x.safetensors", {"__metadata__": {"k": "v"}, "b": B, "a": A}, bytes(19)
    )
    tensors = read_header(path)
    start = path.stat().st_size - 19
    assert tensors["a"] == StoredTensor("a", path, "F32", (2, 2), start, 16)
    assert tensors["b"] == StoredTensor("b", path, "U8", (3,), start + 16, 3)


METADATA: list[Any] = [
    *(None, {}, {"k": "v"}, {"": ""}, {"k": 1}, {"k": None}, {"k": True}, {"k": ["v"]}),
    *({"k": {}}, [], [["k", "v"]], "v", 1, False, A),
]


def test_metadata_is_accepted_where_safetensors_accepts_it(tmp_path: Path) -> None:
    accepted = []
    for metadata in METADATA:
        path = written(tmp_path / "x.safetensors", {"__metadata__": metadata, "a": A}, bytes(16))
        try:
            with safe_open(path, "numpy") as opened:
                assert set(opened.keys()) == {"a"}
        except SafetensorError:
            with pytest.raises(CheckpointError, match=r"__metadata__: found .*, needed an object"):
                read_header(path)
        else:
            assert set(read_header(path)) == {"a"}
            accepted.append(metadata)
    assert accepted == [None, {}, {"k": "v"}, {"": ""}]


LIES: dict[str, tuple[Any, bytes, str]] = {
    "overlap": (
        {"a": A, "b": entry("U8", [3], 14, 17)},
        bytes(17),
        "b: found bytes that overlap a",
    ),
    "hole": ({"a": A, "b": entry("U8", [3], 20, 23)}, bytes(23), "b: found 4 unused bytes"),
    "leftover": ({"a": A}, bytes(20), "needed {end}: the end of a"),
    "truncated": ({"a": A, "b": B}, bytes(11), "b: found {size} bytes in the file (truncated)"),
    "size": ({"a": entry("F32", [2, 2], 0, 12)}, bytes(12), "a: found 12 bytes, needed 16 for F32"),
    "dtype": ({"a": entry("F33", [2, 2], 0, 16)}, bytes(16), "a: found dtype 'F33', needed one of"),
    "shape": ({"a": entry("F32", [-2, -2], 0, 16)}, bytes(16), "a: found shape [-2, -2]"),
    "huge": ({"a": entry("U8", [2**62, 2**62], 0, 16)}, bytes(16), f"needed {2**124} for U8"),
    "reversed": ({"a": entry("U8", [4], 4, 0)}, bytes(4), "a: found data_offsets [4, 0]"),
    "bool": ({"a": entry("U8", [True], 0, 1)}, bytes(1), "a: found shape [True]"),
    "keys": ({"a": {"dtype": "U8", "shape": [1]}}, bytes(1), "a: found an incomplete header entry"),
    "list": ([1, 2], b"", "a JSON header that is no object"),
    "json": (b'{"a": ', b"", "a header that is no JSON"),
    "utf-8": (b'{"\xff": 1}', b"", "a header that is no JSON"),
    "deep": (b"[" * 100_000, b"", "found a"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", "found a"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
        "a: found the same key twice in the header",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(tmp_path: Path, lie: str) -> None:
    header, data, expected = LIES[lie]
    path = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    size = path.stat().st_size
    assert expected.format(size=size, end=size - 4) in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "found 0 bytes, needed at least the 8 bytes"),
        (b"\x00" * 7, "found 7 bytes"),
        ((1 << 60).to_bytes(8, "little"), f"found a header length of {1 << 60}"),
        ((100).to_bytes(8, "little") + b"{}", "found 10 bytes (truncated), needed 108"),
    ],
)
def test_a_broken_length_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
        read_header(path)
    assert expected in str(caught.value)


def test_all_problems_are_counted(tmp_path: Path) -> None:
    header = {"a": entry("F33", [1], 0, 1), "b": entry("F34", [1], 1, 2), "c": B}
    path = written(tmp_path / "x.safetensors", header, bytes(19))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "(and 1 more problem)" in str(caught.value)
    assert "layersweep inspect" in caught.value.hint


def test_control_characters_of_names_are_escaped(tmp_path: Path) -> None:
    header = {"\x1b[31mred\n": entry("F33", [1], 0, 1)}
    path = written(tmp_path / "x.safetensors", header, bytes(1))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[31mred\\n" in str(caught.value)


def test_rows_of_a_fused_tensor() -> None:
    whole = StoredTensor("e", Path("f"), "BF16", (4, 6, 8), 1000, 4 * 6 * 8 * 2)
    expert = whole.rows(2, 1).reshaped((6, 8))
    w3 = expert.rows(3, 3)
    assert (expert.offset, expert.nbytes) == (1000 + 2 * 96, 96)
    assert (w3.shape, w3.offset, w3.nbytes) == ((3, 8), 1000 + 2 * 96 + 48, 48)
    with pytest.raises(ValueError, match=r"rows 3\.\.5"):
        whole.rows(3, 2)


NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I64": np.int64}
tensors_of = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(wanted=tensors_of)
def test_whatever_safetensors_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[str, list[int]]]
) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 100, shape).astype(NUMPY[dtype])
        for name, (dtype, shape) in wanted.items()
    }
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(save(arrays))
    content, tensors = path.read_bytes(), read_header(path)
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted[name][0]
        assert tensor.nbytes == arrays[name].size * ITEM_BYTES[tensor.dtype]
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == arrays[name].tobytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_cause_another_exception(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut or overwritten anywhere, a file is read or refused; tensors never leave the file."""
    raw = bytearray(save({"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.uint8)}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path_factory.mktemp("d") / "x.safetensors"
    path.write_bytes(raw)
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        assert "found" in str(error)
        return
    assert all(8 <= t.offset <= t.offset + t.nbytes <= len(raw) for t in tensors.values())


def test_a_header_of_many_tensors_is_fast(tmp_path: Path) -> None:
    header = {f"tensor.{i}": entry("U8", [10], 10 * i, 10 * i + 10) for i in range(10_000)}
    path = written(tmp_path / "x.safetensors", header, bytes(100_000))
    start = time.perf_counter()
    assert len(read_header(path)) == 10_000
    assert time.perf_counter() - start < 1.0
