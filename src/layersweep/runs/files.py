"""Writing the files of a run: each whole or not there, with the user's modes, on any file system.

What a failure means, its errno says. A file system that has no locks, or cannot sync a folder, can
hold a run all the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from layersweep.errors import InputError, MachineError

LOCK = ".lock"
_MODE = 0o666  # less the umask, which is the user's word on who may go on with a run
_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_NO_LOCKS = {*_UNSUPPORTED, errno.ENOLCK}
_NO_SYNC = {*_UNSUPPORTED, errno.EINVAL, errno.EBADF, errno.EISDIR}
_NOT_YOURS = {errno.EACCES, errno.EPERM}
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in your quota",
    errno.EROFS: "mount the file system for writing",
    errno.EACCES: "see that you may read and write there",
    errno.EPERM: "see that you may read and write there",
    errno.EIO: "check the disk (the system's log says more)",
    errno.ESTALE: "mount the network file system again",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`)",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
}
RESUME = "go on with --resume: finished sweeps are kept"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers see the old file or the new one, after a power failure, too: temporary file beside
    it, fsync, rename, fsync of the folder. Text gets a newline at its end.

    A name that is not UTF-8 (a lone surrogate) is written as the escape \\udcXX, which JSON reads
    back. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (
        content if isinstance(content, bytes) else f"{content}\n".encode(errors="backslashreplace")
    )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            _sync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def lock(path: Path, say: Callable[[str], None], *, wait: bool = False) -> int:
    """A lock on the folder `path`, which is made; its file descriptor. It ends with this process at
    the latest, however that ends. `say` is told where the file system has no locks.

    Raises InputError for a folder that cannot be written, and (unless `wait`) for one that another
    process has locked.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    except OSError as failure:
        raise _unusable(path, failure) from failure
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        if failure.errno in _NO_LOCKS:
            say(
                f"note: {path}: the file system has no locks ({failure.strerror}): nothing keeps a "
                "second run out of this folder"
            )
            return handle
        os.close(handle)
        if failure.errno not in _BUSY:
            raise _unusable(path, failure) from failure
        raise InputError(
            f"--out {path}: found another run at work there, needed a folder of its own",
            hint="wait for it to end, or name another folder",
        ) from failure
    return handle


@contextmanager
def writing(path: Path, then: str = RESUME) -> Iterator[None]:
    """Raises MachineError for an OSError, with a hint for its errno; `then`: what comes next."""
    try:
        yield
    except OSError as failure:
        raise MachineError(
            f"{failure.filename or path}: cannot be written ({failure.strerror})",
            hint=f"{remedy(failure) or 'mend that'}, then {then}",
        ) from failure


def remedy(failure: OSError) -> str:
    """What to do about a file that failed, as a clause; "" where its errno does not say."""
    return _REMEDIES.get(failure.errno or 0, "")


def _unusable(path: Path, failure: OSError) -> InputError:
    place = failure.filename or path
    return InputError(
        f"--out {place}: cannot be written ({failure.strerror})",
        hint=f"{remedy(failure) or 'mend that'}, or name another folder",
    )


def _sync(handle: int) -> None:
    """fsync, where the file system has it."""
    try:
        os.fsync(handle)
    except OSError as failure:
        if failure.errno not in _NO_SYNC:
            raise


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as failure:
        if failure.errno in _NOT_YOURS:  # a folder may be written and not read
            return
        raise
    try:
        _sync(handle)
    finally:
        os.close(handle)
