"""Hub ids: headers by HTTP ranges, and downloads, with huggingface_hub's failures in plain words.

Only safetensors shards, *.json and tokenizer files of the repository's top folder are fetched.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from layersweep.checkpoint.connection import NO_ANSWER, Unreachable, check_client, first_line
from layersweep.checkpoint.files import LocalFolder, is_plain_name
from layersweep.checkpoint.reading import scan_folder
from layersweep.checkpoint.weights import Checkpoint
from layersweep.errors import CheckpointError
from layersweep.problems import DOWNLOAD_AGAIN, FileProblem, Problem, problems_error

SMALL_FILES = ("*.json", "tokenizer*", "*.jinja")
TIMEOUT = 30.0  # seconds without an answer

Scanned = tuple[Checkpoint | None, list[Problem]]


@dataclass(frozen=True)
class RangedFile:
    """A file of a repository behind HTTP, read by ranges."""

    path: Path
    url: str
    size: int

    def read(self, offset: int, count: int) -> bytes:
        stop = min(offset + count, self.size)
        if stop <= offset:
            return b""
        headers = build_hf_headers(headers={"Range": f"bytes={offset}-{stop - 1}"})
        client = get_session()
        with client.stream(
            "GET", self.url, headers=headers, follow_redirects=True, timeout=TIMEOUT
        ) as answer:
            hf_raise_for_status(answer)
            if answer.status_code != 206 and stop - offset != self.size:
                raise OSError(f"the server sent all {self.size} bytes instead of a range")
            return bytes(answer.read())


@dataclass(frozen=True)
class HubFolder:
    """The files of one commit as the hub lists them: name -> size."""

    repository: str
    commit: str
    sizes: dict[str, int]
    has_values: bool = False

    @property
    def label(self) -> str:
        return self.repository

    def names(self) -> frozenset[str]:
        return frozenset(self.sizes)

    def open(self, name: str) -> RangedFile:
        path = Path(self.repository) / name
        if name not in self.sizes or not is_plain_name(name):
            raise FileProblem(
                Problem(str(path), None, "no such file", "this shard", DOWNLOAD_AGAIN)
            )
        url = hf_hub_url(self.repository, name, revision=self.commit)
        return RangedFile(path, url, self.sizes[name])


@dataclass(frozen=True)
class Repository:
    """A hub id. `files` is None where the hub is `unreachable`: only the cache is left."""

    name: str
    revision: str | None
    files: HubFolder | None
    unreachable: Unreachable | None = None

    def scan(self) -> Scanned:
        """From headers alone, or from the cache where the hub cannot be reached."""
        if self.files is None:
            return self.scan_cached()
        with plain_errors(self.name, self.revision):
            return scan_folder(self.files, self.name, self.files.commit, Path(self.name))

    def scan_cached(self) -> Scanned:
        """What the local cache holds of this commit; (None, []) if that is nothing or not all."""
        commit = self.files.commit if self.files else self.revision
        try:
            # Asked for config.json alone: a snapshot without files that are never fetched
            # (pickles) would count as incomplete. `scan_folder` sees what is missing.
            folder = Path(
                snapshot_download(
                    self.name,
                    revision=commit,
                    local_files_only=True,
                    allow_patterns=["config.json"],
                )
            )
        except LocalEntryNotFoundError as error:
            if self.unreachable:
                raise CheckpointError(
                    f"{self.name}: found neither the hub nor a copy in the cache, needed one "
                    f"({self.unreachable.why})",
                    hint=self.unreachable.hint,
                ) from error
            return None, []
        local = LocalFolder.at(folder)
        if self.files and not self._small_files() <= local.names():
            return None, []
        checkpoint, problems = scan_folder(local, self.name, folder.name, folder)
        if checkpoint and self.unreachable:
            note = (
                f"no connection to the hub ({self.unreachable.why}): the copy in the cache is used"
            )
            checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
        return checkpoint, problems

    def incomplete(self, problems: Sequence[Problem]) -> CheckpointError:
        """Why the copy in the cache does not do, and why nothing but it can be had."""
        assert self.unreachable is not None
        return CheckpointError(
            f"{problems_error(problems)} (no connection to the hub: {self.unreachable.why})",
            hint=self.unreachable.hint,
        )

    def download(self, checkpoint: Checkpoint) -> Scanned:
        """Fetch the shards of a scanned checkpoint and the small files, and scan them again."""
        assert self.files is not None
        names = self.wanted(checkpoint)
        with plain_errors(self.name, self.revision):
            folder = snapshot_download(
                self.name,
                revision=self.files.commit,
                allow_patterns=[glob.escape(name) for name in names],
            )
        return scan_folder(LocalFolder.at(Path(folder)), self.name, self.files.commit, Path(folder))

    def wanted(self, checkpoint: Checkpoint) -> dict[str, int]:
        """Sizes of what is fetched of a scanned checkpoint: its shards and the small files."""
        assert self.files is not None
        names = self._small_files() | {file.name for file in checkpoint.files}
        return {name: self.files.sizes[name] for name in sorted(names)}

    def _small_files(self) -> frozenset[str]:
        names = self.files.names() if self.files else frozenset()
        kept = (name for name in names if any(fnmatch(name, kind) for kind in SMALL_FILES))
        return frozenset(name for name in kept if is_plain_name(name))


def find(name: str, revision: str | None) -> Repository:
    """Ask the hub what the repository holds. Raises CheckpointError if it has none such."""
    try:
        with plain_errors(name, revision):
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except Unreachable as failure:
        return Repository(name, revision, None, failure)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Repository(name, revision, HubFolder(name, info.sha or revision or "main", sizes))


@contextmanager
def plain_errors(name: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's and its HTTP library's failures as CheckpointErrors."""
    check_client(name)
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: found a gated model, needed access to it",
            hint="accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name}: found no revision '{revision}', needed a branch, tag or commit",
            hint="look at the model's files page for its revisions, or leave --revision out",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{name}: found neither a local folder nor such a model on the hub, needed one",
            hint="check the spelling; for a private model log in with `hf auth login`",
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{name}: found an error from the hub ({first_line(error)}), needed an answer",
            hint="try again later, or give a local folder",
        ) from error
    except NO_ANSWER as error:
        hint = "connect to the network (unset HF_HUB_OFFLINE)"
        raise Unreachable(name, first_line(error), hint) from error
