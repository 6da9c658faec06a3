"""The tokens of a text of any length, encoded as far as they are needed, in bounded memory.

    text     ------------------------------------------------------------->
    piece    [==================~~~|~~~]          ~~~ both pieces have it
    next                       [~~~|~~~===================~~~|~~~]
                                   joint: from here on the next one's tokens

A piece has tokens near its ends that the whole text has not. So two pieces are joined where both
have the same tokens for a while. For BPE this is proof: tokens are those of the text if each
two neighbours are, and every two neighbours stand together in one of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layersweep.errors import BudgetError, InputError
from layersweep.text.tokenizer import TextTokenizer
from layersweep.units import format_bytes

SMALL_TEXT = 4 * 2**20
"""Characters. A text up to here is always encoded whole: all of its windows are counted, and
needles are hidden in all of it. Of a longer one windows are not counted where a number of them is
asked for, and needles are hidden in its head."""

PIECE = 2**16  # characters; where no joint is found, twice that, and so on up to SMALL_TEXT
PIECE_BYTES = PIECE * 4 * 600  # while it is encoded, with a token for each of UTF-8's 4 bytes
TOKEN_BYTES = 2 * 16 + 40  # its row, twice while rows are joined, and its id as Python's integer
OVERLAP = 16  # the share of a piece, one in 16, in which a joint is looked for
ALIKE = 64  # tokens around a joint that both pieces have

Ints = NDArray[np.int32]


class _NoJoint(Exception):
    """No two pieces agree somewhere; the message says where."""


@dataclass(frozen=True)
class _Piece:
    """Tokens of text[begin:end]. `rows`: [4, tokens]: id, first and last + 1 character in the
    whole text, whether the pre-tokenizer has split before the token."""

    begin: int
    end: int
    rows: Ints

    def first_after(self, character: int) -> int:
        """The first token that starts there or after it."""
        return int(np.searchsorted(self.rows[1], character))


class EncodedText:
    """A text and as many of its tokens, from the start, as somebody asked for.

    `ids`: int32. `starts`, `ends`: each token's first and last + 1 character. They equal those of
    `tokenizer.encode_with_offsets(text)`. `complete`: they are all of the text's.
    """

    def __init__(self, text: str, tokenizer: TextTokenizer, available: int | None = None) -> None:
        """`available`: bytes of host memory, where they are bounded."""
        self.text, self.tokenizer, self.available = text, tokenizer, available
        self.notes: list[str] = []  # what the run has to announce
        self.complete = False
        self.ids, self.starts, self.ends = (np.empty(0, np.int32) for _ in range(3))
        self._piece = self._encode(0, PIECE)
        self._joint = 0  # the piece's tokens from here on are the text's

    @property
    def is_small(self) -> bool:
        return len(self.text) <= SMALL_TEXT

    def reach(self, tokens: int | None) -> None:
        """Have `tokens` or more, or all that there are.

        Raises BudgetError where they do not fit, InputError where pieces cannot be joined and the
        text is too long to be one.
        """
        self._check_room(tokens)
        self._advance(lambda count: tokens is not None and count >= tokens)

    def head(self, characters: int) -> tuple[str, Ints, Ints]:
        """The text's first `characters`, and `starts` and `ends` of the tokens in them. Raises as
        `reach`."""
        text = self.text[:characters]
        self._check_room(len(text.encode()))
        self._advance(lambda count: self._reached > characters)
        count = int(np.searchsorted(self.ends, characters, side="right"))
        return text, self.starts[:count], self.ends[:count]

    def _check_room(self, tokens: int | None) -> None:
        if self.is_small or self.available is None:
            return
        needed = encoding_bytes(len(self.text.encode()), tokens)
        if needed > self.available:
            raise BudgetError(
                f"--ram: available {format_bytes(self.available)}, needed {format_bytes(needed)} "
                "for the tokens of the text",
                hint="a larger --ram, a shorter --text FILE, or fewer --segments",
            )

    def _advance(self, enough: Callable[[int], bool]) -> None:
        """Append parts until the number of tokens is `enough` or the text ends."""
        parts, count = [np.stack([self.ids, self.starts, self.ends])], len(self.ids)
        try:
            while not self.complete and not enough(count):
                parts.append(self._next_part())
                count += parts[-1].shape[1]
        except _NoJoint as error:
            if not self.is_small:
                raise InputError(
                    f"--text: found no place to cut it in {error}: wherever the tokenizer starts, "
                    "it splits them in another way; needed one",
                    hint="use a text of lines and words, or one of at most "
                    f"{SMALL_TEXT >> 20} million characters",
                ) from error
            parts = [self._encode(0, len(self.text)).rows[:3]]
            self.complete = True
        self.ids, self.starts, self.ends = np.concatenate(parts, axis=1)

    @property
    def _reached(self) -> int:
        """The first character of the first token that is not yet settled."""
        return int(self._piece.rows[1, self._joint]) if self._joint else 0

    def _encode(self, begin: int, size: int) -> _Piece:
        end = min(begin + size, len(self.text))
        found = self.tokenizer.encode_with_words(self.text[begin:end])
        spans = np.array(found.offsets, np.int32).reshape(-1, 2) + np.int32(begin)
        words = np.array(found.word_ids, np.int32)
        rows = np.stack([np.array(found.ids, np.int32), *spans.T, np.diff(words, prepend=0) != 0])
        return _Piece(begin, end, rows)

    def _next_part(self) -> Ints:
        """ids, starts and ends of the piece's tokens up to where the next one continues."""
        piece, first = self._piece, self._joint
        while piece.end < len(self.text):
            size = piece.end - piece.begin
            following = self._encode(piece.end - size // OVERLAP, max(PIECE, size // 4))
            joint = _find_joint(piece, following)
            if joint:
                self._piece, self._joint = following, joint[1]
                return piece.rows[:3, first : joint[0]]
            piece = self._longer(piece, certain=first and first + ALIKE // 2)
        self.complete = True
        return piece.rows[:3, first:]

    def _longer(self, piece: _Piece, certain: int) -> _Piece:
        """Twice the piece. Its `certain` first tokens, by which it was joined, have to stay."""
        size = 2 * (piece.end - piece.begin)
        if size <= SMALL_TEXT:
            longer = self._encode(piece.begin, size)
            if np.array_equal(longer.rows[:, :certain], piece.rows[:, :certain]):
                return longer
        raise _NoJoint(f"characters {piece.begin} to {piece.end}")


def _find_joint(piece: _Piece, following: _Piece) -> tuple[int, int] | None:
    """A token of the one, and the same of the other, in the middle of ALIKE equal ones."""
    half = ALIKE // 2
    for start in piece.rows[1, piece.first_after(following.begin) :: half]:
        i, j = piece.first_after(start), following.first_after(start)
        ours, theirs = piece.rows[:, i - half : i + half], following.rows[:, j - half : j + half]
        if min(i, j) >= half and ours.shape[1] == ALIKE and np.array_equal(ours, theirs):
            return i, j
    return None


def encoding_bytes(size: int, tokens: int | None) -> int:
    """A bound on what a text of `size` bytes and `tokens` of it, None for all, take in host memory
    while windows are cut.

    A token stands for a byte or more. Pieces that have to grow are not counted.
    """
    most = size if tokens is None else min(size, tokens + 2 * PIECE)
    return size + most * TOKEN_BYTES + 2 * PIECE_BYTES
