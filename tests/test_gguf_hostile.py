"""GGUF files from strangers: refused by name, quickly and in little memory."""

from __future__ import annotations

import os
import random
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz_checkpoint import LONGEST_MESSAGE, read_all
from hostile_gguf import CASES, U16, File, mutated, number, valid

from layersweep.checkpoint import open_checkpoint, scan_checkpoint
from layersweep.errors import CheckpointError

SECONDS, BYTES = 2.0, 64 * 2**20


def opened(path: Path) -> None:
    """Headers, then every weight."""
    read_all(open_checkpoint(str(path)))


def test_the_file_that_is_damaged_is_valid_before(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid().encode())
    opened(path)
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "model.gguf"
    path.write_bytes(case.file.encode())
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(CheckpointError) as refusal:
        opened(path)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(refusal.value)
    assert "model.gguf" in message and message.isprintable()
    assert [word for word in case.says if word not in message] == [], message
    assert refusal.value.hint and "config.json" not in message + refusal.value.hint
    assert seconds < SECONDS and peak < BYTES
    found = scan_checkpoint(str(path))[1] if not case.values else []
    assert bool(found) is not case.values  # `inspect` lists what headers show


def parts(folder: Path, count: int = 3) -> Path:
    """The valid file, split; returns the first."""
    whole = valid()
    each = [whole.tensors[first::count] for first in range(count)]
    for index, own in enumerate(each):
        file = replace(whole if index == 0 else File((), ()), tensors=own)
        file = file.with_key("split.no", U16, number(U16, index))
        file = file.with_key("split.count", U16, number(U16, count))
        file = file.with_key("split.tensors.count", U16, number(U16, len(whole.tensors)))
        part(folder, index, count).write_bytes(file.encode())
    return part(folder, 0, count)


def part(folder: Path, index: int, count: int = 3) -> Path:
    return folder / f"model-{index + 1:05}-of-{count:05}.gguf"


def test_a_split_file_is_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "whole.gguf").write_bytes(valid().encode())
    whole = open_checkpoint(str(tmp_path / "whole.gguf"))
    split = open_checkpoint(str(parts(tmp_path)))
    assert len(split.files) == 3 and split.nbytes == whole.nbytes
    assert split.weights.keys() == whole.weights.keys()
    read_all(split)


def test_a_split_file_with_a_part_missing_changed_or_mixed_is_refused(tmp_path: Path) -> None:
    first = parts(tmp_path)
    content = part(tmp_path, 2).read_bytes()
    part(tmp_path, 2).unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.gguf: found no such file"):
        open_checkpoint(str(first))
    part(tmp_path, 2).write_bytes(part(tmp_path, 1).read_bytes())
    with pytest.raises(CheckpointError, match=r"split\.no: found 1, needed 2|the same tensor"):
        open_checkpoint(str(first))
    part(tmp_path, 2).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: split\.count: found"):
        open_checkpoint(str(part(tmp_path, 1)))
    part(tmp_path, 1).unlink()
    os.symlink(Path("/etc/passwd"), part(tmp_path, 1))
    with pytest.raises(CheckpointError, match="found a link to /etc/passwd"):
        open_checkpoint(str(first))


def test_a_folder_of_gguf_files_says_which_to_give(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid().encode())
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(str(tmp_path))
    assert f"give the GGUF file itself: {path}" in refusal.value.hint


def test_a_file_with_any_bytes_changed_is_read_or_refused_by_name(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    rng, raw, path = random.Random(seed), valid().encode(), tmp_path / "model.gguf"
    accepted = 0
    for _ in range(300):
        path.write_bytes(mutated(rng, raw))
        started = time.process_time()
        try:
            opened(path)
            accepted += 1
        except CheckpointError as refusal:
            message = f"{refusal} {refusal.hint}"
            assert message.isprintable() and len(message) < LONGEST_MESSAGE, seed
        assert time.process_time() - started < SECONDS, seed
    assert 0 < accepted < 200, seed
