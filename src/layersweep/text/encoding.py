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

PIECE = 2**16  # characters
PIECE_BYTES = 40 * 2**20  # a piece while it is encoded, of one token per character
LONGEST_PIECE = 2**22  # 690 MiB; a piece grows only where no joint is found
OVERLAP = 16  # the share of a piece, one in 16, in which a joint is looked for
ALIKE = 64  # tokens around a joint that both pieces have

Ints = NDArray[np.int32]


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

    def __init__(self, text: str, tokenizer: TextTokenizer) -> None:
        self.text, self.tokenizer = text, tokenizer
        self.complete = False
        self.ids, self.starts, self.ends = (np.empty(0, np.int32) for _ in range(3))
        self._piece = self._encode(0, PIECE)
        self._joint = 0  # the piece's tokens from here on are the text's

    @property
    def is_small(self) -> bool:
        return len(self.text) <= SMALL_TEXT

    def reach(self, tokens: int | None) -> None:
        """Have `tokens` or more, or all that there are. Raises InputError where pieces cannot be
        joined."""
        parts, count = [], len(self.ids)
        while not self.complete and (tokens is None or count < tokens):
            parts.append(self._next_part())
            count += parts[-1].shape[1]
        self._append(parts)

    def head(self, characters: int) -> tuple[str, Ints, Ints]:
        """The text's first `characters`, and `starts` and `ends` of the tokens in them."""
        parts = []
        while not self.complete and self._reached <= characters:
            parts.append(self._next_part())
        self._append(parts)
        count = int(np.searchsorted(self.ends, characters, side="right"))
        return self.text[:characters], self.starts[:count], self.ends[:count]

    @property
    def _reached(self) -> int:
        """The first character of the first token that is not yet settled."""
        return int(self._piece.rows[1, self._joint]) if self._joint else 0

    def _append(self, parts: list[Ints]) -> None:
        rows = np.concatenate([np.stack([self.ids, self.starts, self.ends]), *parts], axis=1)
        self.ids, self.starts, self.ends = rows

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
        """Twice the piece, whose `certain` first tokens must stay."""
        size = 2 * (piece.end - piece.begin)
        longer = self._encode(piece.begin, size)
        stay = np.array_equal(longer.rows[:, :certain], piece.rows[:, :certain])
        if not stay or size > LONGEST_PIECE:
            raise InputError(
                f"--text: found no place to cut it in characters {piece.begin} to {piece.end}: "
                "the tokenizer splits them otherwise from every start; needed one",
                hint="use a text of lines and words, or a tokenizer without dropout",
            )
        return longer


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
    """A bound on the memory that `tokens` of a text of `size` bytes, or all, take while windows
    are cut: ids and offsets twice, ids as Python's integers, and two pieces.

    A token stands for a byte or more. Pieces that have to grow are not counted.
    """
    most = size if tokens is None else min(size, max(tokens, 4 * SMALL_TEXT))
    return size + most * (2 * 12 + 40) + 2 * PIECE_BYTES


def check_memory(size: int, tokens: int | None, available: int) -> None:
    """Raise BudgetError where a text of `size` bytes, not a small one, is too long to encode."""
    needed = encoding_bytes(size, tokens)
    if size > SMALL_TEXT and needed > available:
        raise BudgetError(
            f"--ram: available {format_bytes(available)}, needed {format_bytes(needed)} for the "
            f"tokens of {format_bytes(size)} of text",
            hint="a larger --ram, a shorter --text FILE, or fewer --segments",
        )
