"""Windows of the text: the consecutive tokens that perplexity is measured on."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from layersweep.errors import InputError
from layersweep.text.bos import BosMode, resolve_bos
from layersweep.text.encoding import EncodedText
from layersweep.text.source import headings
from layersweep.text.tokenizer import hash_ids


@dataclass(frozen=True)
class Window:
    """`ids` are prefix + continuation tokens; the first `prefix` of them are the prefix.

    `article` is the heading under which the window's first text token stands, None before
    the first heading. `tokens_sha` is the SHA-256 of the ids as little-endian uint32, `possible`
    the number of windows that the text has, None where it is long and not encoded to its end.
    """

    index: int
    ids: tuple[int, ...]
    prefix: int
    article: str | None
    tokens_sha: str
    possible: int | None


def cut_windows(
    encoded: EncodedText,
    *,
    segments: int | None,
    prefix: int,
    continuation: int,
    bos: BosMode,
) -> list[Window]:
    """The first `segments` windows of the text in order, all of them where it is None.

    The text is encoded as far as they need it. With BOS a window is BOS and prefix +
    continuation - 1 text tokens; none is dropped between windows. Raises InputError for
    impossible lengths and where the text has too few tokens.
    """
    _check_lengths(segments, prefix, continuation)
    bos_id = resolve_bos(encoded.tokenizer, bos)
    lead = () if bos_id is None else (bos_id,)
    stride = prefix + continuation - len(lead)
    encoded.reach(None if segments is None or encoded.is_small else segments * stride)
    found = len(encoded.ids) // stride
    count = found if segments is None else segments
    if count > found or found == 0:
        raise InputError(
            f"--segments: found {len(encoded.ids)} tokens of text = {found} windows of "
            f"{prefix} + {continuation}, needed {'at least 1' if segments is None else count}",
            hint=_shortage_hint(found),
        )
    possible = found if encoded.complete else None
    titles = headings(encoded.text)
    windows = []
    for index in range(count):
        start = index * stride
        window_ids = (*lead, *encoded.ids[start : start + stride].tolist())
        article = _article_at(titles, int(encoded.starts[start]))
        sha = hash_ids(window_ids)
        windows.append(Window(index, window_ids, prefix, article, sha, possible))
    return windows


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
