"""The text that perplexity is measured on and needles are hidden in."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from dataclasses import dataclass
from importlib import resources

from layersweep.errors import InputError
from layersweep.units import format_bytes

LARGEST_TEXT = 2**30  # bytes: it is read into memory
_NOT_READ = {FileNotFoundError: "no such file", IsADirectoryError: "a folder"}

WIKITEXT_REPOSITORY = "Salesforce/wikitext"
WIKITEXT_FILE = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
WIKITEXT_HINT = "give a text with --text FILE, or download the file where there is a network"

# " = Title = " of wikitext and "= path =" of the demo's text. Two signs or more on a side
# ("= = Section = =") head a section of an article, not an article.
_HEADING = re.compile(r"^[ \t]*= (?!=)(\S|\S.*?[^=\s]) =[ \t\r]*$", re.MULTILINE)


@dataclass(frozen=True)
class SourceText:
    """`sha256` is over the UTF-8 bytes of `text`; `source` is what reports print."""

    text: str
    source: str
    sha256: str


def load_text(path: str | None, model_source: str) -> SourceText:
    """The file or pipe given; else the demo's held-out text for the demo; else wikitext-2 raw test.

    Raises InputError where it is absent, empty or no UTF-8, and where wikitext cannot be had.
    """
    if path is not None:
        return _source(_read_file(path), printable(path))
    if model_source == "demo":
        held_out = resources.files("layersweep.demo") / "text" / "heldout.txt"
        return _source(held_out.read_bytes().decode("utf-8"), "demo held-out (celery 5.7.0)")
    return _source(_read_wikitext(), "wikitext-2-raw-v1 test")


def headings(text: str) -> list[tuple[int, str]]:
    """(character offset, title) of the article headings of `text`, in order."""
    return [(match.start(), match[1]) for match in _HEADING.finditer(text)]


def _source(text: str, source: str) -> SourceText:
    return SourceText(text, source, hashlib.sha256(text.encode()).hexdigest())


def _read_file(path: str) -> str:
    """What a file, a pipe or /dev/stdin gives: as it is, line ends too, without a BOM."""
    named, hint = f"--text {printable(path)}", "give a UTF-8 text file with --text FILE"
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_TEXT + 1)
    except OSError as error:
        found = _NOT_READ.get(type(error), error.strerror)
        raise InputError(f"{named}: found {found}, needed a text file", hint=hint) from error
    if len(data) > LARGEST_TEXT:
        raise InputError(
            f"{named}: found more than {format_bytes(LARGEST_TEXT)}, needed at most that",
            hint="windows and needles are of the start of a text: cut it there",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{named}: found byte 0x{data[error.start]:02x} at {error.start}, needed UTF-8 text",
            hint=hint,
        ) from error
    if not text.strip():
        raise InputError(f"{named}: found an empty file, needed text", hint=hint)
    return text


def printable(path: str) -> str:
    """A file's name as any encoder takes it: bytes that are no UTF-8 as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _read_wikitext() -> str:
    """The dataset's rows, joined with two newlines."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError(
            "wikitext-2: found no pyarrow, needed it to read the data set's parquet file",
            hint="pip install pyarrow, or give a text with --text FILE",
        ) from error
    rows: list[str] = parquet.read_table(_wikitext_path(), columns=["text"])["text"].to_pylist()
    return "\n\n".join(rows)


def _wikitext_path() -> str:
    """The parquet file in the hub cache, downloaded first where it is not there."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    from layersweep.checkpoint.connection import (
        INVALID_URL,
        TRANSPORT_ERROR,
        Unreachable,
        check_client,
    )

    cached = try_to_load_from_cache(WIKITEXT_REPOSITORY, WIKITEXT_FILE, repo_type="dataset")
    if isinstance(cached, str):
        return cached
    try:
        check_client("wikitext-2")
        # asked for once before the download, which would retry for 23 s without a network
        url = hf_hub_url(WIKITEXT_REPOSITORY, WIKITEXT_FILE, repo_type="dataset")
        get_hf_file_metadata(url, timeout=10)
        return hf_hub_download(WIKITEXT_REPOSITORY, WIKITEXT_FILE, repo_type="dataset")
    except Unreachable as error:
        raise _no_wikitext(error.why, f"{error.remedy}, or {WIKITEXT_HINT}") from error
    except (OSError, TRANSPORT_ERROR, INVALID_URL) as error:
        raise _no_wikitext(str(error), WIKITEXT_HINT) from error


def _no_wikitext(why: str, hint: str) -> InputError:
    return InputError(
        f"wikitext-2: found neither a cached copy nor a way to the hub ({why}), "
        f"needed {WIKITEXT_FILE} of {WIKITEXT_REPOSITORY}",
        hint=hint,
    )
