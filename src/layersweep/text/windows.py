"""Windows of the text: the consecutive tokens that perplexity is measured on."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from layersweep.errors import InputError
from layersweep.text.source import headings
from layersweep.text.tokenizer import TextTokenizer

BosMode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Window:
    """`ids` are prefix + continuation tokens; the first `prefix` of them are the prefix.

    `article` is the heading under which the window's first text token stands, None before
    the first heading. `tokens_sha` is the SHA-256 of the ids as little-endian uint32, `possible`
    the number of windows that the text has.
    """

    index: int
    ids: tuple[int, ...]
    prefix: int
    article: str | None
    tokens_sha: str
    possible: int


def resolve_bos(tokenizer: TextTokenizer, bos: BosMode) -> int | None:
    """Id of the BOS token to put first, or None for none.

    `auto` puts it where the tokenizer's default call does. Raises InputError for `always`
    with a tokenizer that has no BOS, and for any other word.
    """
    if bos not in ("auto", "always", "never"):
        raise InputError(f"--bos: found '{bos}', needed auto, always or never")
    if bos == "always" and tokenizer.bos_id is None:
        raise InputError(
            "--bos always: found a tokenizer without a BOS token, needed one",
            hint="use --bos auto or --bos never",
        )
    wanted = bos == "always" or (bos == "auto" and tokenizer.bos_by_default)
    return tokenizer.bos_id if wanted else None


def cut_windows(
    text: str,
    tokenizer: TextTokenizer,
    *,
    segments: int | None,
    prefix: int,
    continuation: int,
    bos: BosMode,
) -> list[Window]:
    """The first `segments` windows of `text` in order, all of them where it is None.

    The text is tokenized once. With BOS a window is BOS and prefix + continuation - 1 text
    tokens; none is dropped between windows. Raises InputError for impossible lengths and
    where the text has too few tokens.
    """
    _check_lengths(segments, prefix, continuation)
    bos_id = resolve_bos(tokenizer, bos)
    lead = () if bos_id is None else (bos_id,)
    stride = prefix + continuation - len(lead)
    ids, offsets = tokenizer.encode_with_offsets(text)
    possible = len(ids) // stride
    count = possible if segments is None else segments
    if count > possible or possible == 0:
        raise InputError(
            f"--segments: found {len(ids)} tokens of text = {possible} windows of "
            f"{prefix} + {continuation}, needed {'at least 1' if segments is None else count}",
            hint=_shortage_hint(possible),
        )
    titles = headings(text)
    windows = []
    for index in range(count):
        start = index * stride
        window_ids = (*lead, *ids[start : start + stride])
        article = _article_at(titles, offsets[start][0])
        sha = hash_ids(window_ids)
        windows.append(Window(index, window_ids, prefix, article, sha, possible))
    return windows


def hash_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian uint32: equal exactly when the tokens are."""
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).hexdigest()


def _article_at(titles: list[tuple[int, str]], character: int) -> str | None:
    before = bisect_right(titles, character, key=lambda title: title[0])
    return titles[before - 1][1] if before else None


def _check_lengths(segments: int | None, prefix: int, continuation: int) -> None:
    if segments is not None and segments < 1:
        raise InputError(
            f"--segments: found {segments}, needed 1 or more", hint="for example --segments 80"
        )
    if prefix < 1:
        raise InputError(
            f"--prefix: found {prefix}, needed 1 or more tokens", hint="for example --prefix 1024"
        )
    if continuation < 2:
        raise InputError(
            f"--continuation: found {continuation}, needed 2 or more tokens "
            "(the first one is not scored)",
            hint="for example --continuation 512",
        )


def _shortage_hint(possible: int) -> str:
    shorter = "a longer --text FILE, or smaller --prefix and --continuation"
    return f"use --segments {possible}, {shorter}" if possible else f"use {shorter}"
