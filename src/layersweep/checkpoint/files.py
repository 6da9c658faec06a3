"""Where bytes come from: a file of a local folder, or ranges of a file behind HTTP.

Headers are parsed the same way from both. Only `LocalFolder` decides which paths may be read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from layersweep.checkpoint.strict_json import LARGEST_JSON
from layersweep.errors import CheckpointError
from layersweep.problems import DOWNLOAD_AGAIN, FileProblem, Problem, show

LINKS = "LAYERSWEEP_LINKS"
LONGEST_NAME = 255  # bytes on every file system, so at most as many characters


class ByteSource(Protocol):
    """A file of known size that can be read in ranges. `path` names it in messages."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int: ...

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`, fewer only where the file ends. Raises OSError."""
        ...


class Folder(Protocol):
    """The files of one checkpoint."""

    @property
    def label(self) -> str:
        """Names the folder in messages."""
        ...

    @property
    def has_values(self) -> bool:
        """Whether small values inside tensors may be read too, or headers alone."""
        ...

    def names(self) -> frozenset[str]: ...

    def open(self, name: str) -> ByteSource:
        """Raises FileProblem for a file that is absent or must not be read."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine; opened for each read, so nothing is left open."""

    path: Path
    size: int

    def read(self, offset: int, count: int) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            parts, wanted = [], count
            while wanted and (part := os.pread(descriptor, wanted, offset + count - wanted)):
                parts.append(part)
                wanted -= len(part)
            return b"".join(parts)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class LocalFolder:
    """A folder that the user named, or a hub snapshot. `root` is its resolved path.

    `links`: folders that its links may lead into, besides itself and the blobs of its hub cache:
    those that the user named in LAYERSWEEP_LINKS, with colons between.
    """

    folder: Path
    root: Path
    has_values: bool = True
    links: tuple[Path, ...] = ()

    @staticmethod
    def at(folder: Path) -> LocalFolder:
        """Raises CheckpointError when there is no such folder."""
        if not folder.exists():
            raise CheckpointError(
                f"{folder}: found nothing, needed a folder with a checkpoint",
                hint="give a local folder, a hub id like org/name, or demo",
            )
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: found a file, needed the folder that holds the checkpoint",
                hint=f"give {folder.parent} instead",
            )
        named = os.environ.get(LINKS, "").split(os.pathsep)
        return LocalFolder(
            folder, folder.resolve(), links=tuple(_resolved(place) for place in named if place)
        )

    @property
    def label(self) -> str:
        return str(self.folder)

    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in os.scandir(self.root))

    def open(self, name: str) -> LocalFile:
        path = str(self.folder / name)
        if not is_plain_name(name):
            hint = "shards must lie in the checkpoint's own folder"
            found = f"file name {show(name)}"
            raise FileProblem(Problem(path, None, found, "a plain name", hint))
        try:
            os.lstat(self.root / name)  # costs a tenth of `resolve` where there is none
            real = (self.root / name).resolve(strict=True)
            status = real.stat()
        except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
            hint = "download the checkpoint completely"
            raise FileProblem(Problem(path, None, "no such file", "this shard", hint)) from error
        if not self._allowed(real):
            needed = f"a file inside {self.root}"
            hint = (
                "copy the file there, or name the folder that its links lead into: "
                f"{LINKS}={real.parent}"
            )
            raise FileProblem(Problem(path, None, f"a link to {real}", needed, hint))
        if not stat.S_ISREG(status.st_mode) or not os.access(real, os.R_OK):
            found = "something that is no readable regular file"
            raise FileProblem(Problem(path, None, found, "a file", DOWNLOAD_AGAIN))
        return LocalFile(Path(path), status.st_size)

    def _allowed(self, real: Path) -> bool:
        if any(real.is_relative_to(place) for place in (self.root, *self.links)):
            return True
        return self.root.parent.name == "snapshots" and (
            real.parent == self.root.parent.parent / "blobs"
        )


def _resolved(place: str) -> Path:
    return Path(place).expanduser().resolve()


def is_plain_name(name: str) -> bool:
    """A file name without any folder: no separators, no drive, no dots alone; printable, so it
    holds no NUL, no line end and no lone surrogate, which no file system call takes."""
    plain = name.isprintable() and not set(name) & set("/\\:")
    return bool(name) and plain and name not in (".", "..") and len(name) <= LONGEST_NAME


def read_small(folder: Folder, name: str) -> bytes:
    """All of a JSON or text file. Raises FileProblem for one that is absent, must not be read,
    cannot be read or is too large."""
    source = folder.open(name)
    try:
        if source.size <= LARGEST_JSON:
            return source.read(0, source.size)
        found, needed = f"{source.size} bytes", f"at most {LARGEST_JSON}"
    except OSError as error:
        found, needed = str(error), "a readable file"
    raise FileProblem(Problem(str(source.path), None, found, needed, DOWNLOAD_AGAIN))
