"""Writing files on file systems that lack calls, under any umask, with names of any bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from layersweep.errors import InputError, MachineError
from layersweep.runs.files import lock, write_atomically, writing


def fail(code: int, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """From here on `module.name` fails with `code`, of os.fsync alone for folders."""
    real = getattr(module, name)

    def call(handle: int, *more: Any) -> Any:
        if module is os and not stat.S_ISDIR(os.fstat(handle).st_mode):
            return real(handle, *more)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, name, call)


# --- locks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_without_one(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(code, monkeypatch, fcntl, "flock")
    said: list[str] = []
    for wait in (False, True):
        os.close(lock(tmp_path / "run", said.append, wait=wait))
    assert len(said) == 2
    assert f"has no locks ({os.strerror(code)})" in said[0]


@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        (errno.EWOULDBLOCK, "found another run at work there", "wait for it to end"),
        (errno.EACCES, "found another run at work there", "wait for it to end"),
        (errno.EIO, r"cannot be written \(Input/output error\)", "check the disk"),
    ],
)
def test_a_lock_that_is_refused(
    code: int, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(code, monkeypatch, fcntl, "flock")
    with pytest.raises(InputError, match=message) as refused:
        lock(tmp_path, print)
    assert refused.value.hint.startswith(hint)


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_folder_that_cannot_be_synced_is_no_failure(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(code, monkeypatch, os, "fsync")
    write_atomically(tmp_path / "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "{}\n"


def test_a_folder_whose_sync_fails_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(errno.EIO, monkeypatch, os, "fsync")
    with pytest.raises(MachineError, match="Input/output error"), writing(tmp_path):
        write_atomically(tmp_path / "a.json", "{}")


def test_a_mode_that_cannot_be_set_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fchmod", refuse)
    write_atomically(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "make room, then go on with --resume"),
        (errno.EDQUOT, "make room in your quota, then"),
        (errno.EROFS, "mount the file system for writing, then"),
        (errno.EIO, "check the disk"),
        (errno.EACCES, "see that you may read and write there, then"),
        (errno.ELOOP, "mend that, then go on with --resume"),
    ],
)
def test_the_hint_is_that_of_the_errno(code: int, hint: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as failed, writing(tmp_path):
        raise OSError(code, os.strerror(code), "a.json")
    assert str(failed.value) == f"a.json: cannot be written ({os.strerror(code)})"
    assert failed.value.hint.startswith(hint)


def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.json", "old")

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="busy"):
        write_atomically(tmp_path / "a.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old\n"}


# --- modes ---------------------------------------------------------------------------------------


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o077, 0o600), (0o022, 0o644)])
def test_modes_are_those_of_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    with umask(mask):
        os.close(lock(tmp_path, print))
        write_atomically(tmp_path / "a.json", "{}")
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == {".lock": mode, "a.json": mode}


# --- names ---------------------------------------------------------------------------------------


def test_a_name_that_is_not_utf8_is_written_escaped_and_read_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    path = tmp_path / os.fsdecode(b"r\xe9sultats.json")
    write_atomically(path, json.dumps({"text": name, "é": "é"}, ensure_ascii=False))
    assert path.read_bytes() == '{"text": "caf\\udce9.txt", "é": "é"}\n'.encode()
    assert json.loads(path.read_text("utf-8"))["text"] == name
