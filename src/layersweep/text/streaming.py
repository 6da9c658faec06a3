"""Text as tokens arrive: whole characters only, nothing given out is ever taken back.

    id --special?--> token --_Bytes or _Window--> characters --stop strings--> text

What comes out adds up to what the tokenizer makes of all ids at once. Each token is decoded with
the few before it that it depends on, so the work grows with the length of the text alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from layersweep.text.tokenizer import TextTokenizer


class TextStream:
    """The text of one answer, special tokens skipped, up to the first stop string.

    `stopped`: a stop string is complete; it is not part of the text, and nothing follows.
    `after`: ids that the answer continues. With them the text is a continuation of theirs; without
    them it is a text of its own, and loses the blank that SentencePiece puts before a first word.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._tokenizer, self._stop, self._held = tokenizer, tuple(stop), ""
        self._decoder: _Decoder = (
            _Bytes() if tokenizer.joins_bytes else _Window(tokenizer, reversed(after))
        )

    def push(self, id: int) -> str:
        """What is certain with one more token, perhaps nothing."""
        token = self._tokenizer.spelling(id)
        if self.stopped or token is None:
            return ""
        return self._give(self._decoder.push(id, token))

    def finish(self) -> str:
        """The rest: half a character, as the tokenizer shows it, and what began like a stop."""
        if self.stopped:
            return ""
        text = self._give(self._decoder.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _give(self, text: str) -> str:
        """All but the start of a stop string; up to the stop that is complete first."""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop]
        complete = [(end, start) for end, start in found if start >= 0]
        if complete:
            self.stopped, self._held = True, ""
            return text[: min(complete)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)


class _Decoder(Protocol):
    def push(self, id: int, token: str) -> str: ...
    def finish(self) -> str: ...


class _Bytes:
    """Tokens spelled in the byte alphabet of GPT-2: their bytes are UTF-8, in one row."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int, token: str) -> str:
        return self._utf8.decode(_bytes_of(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """Printable bytes of Latin-1 stand for themselves, the others for characters from 256 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_ALPHABET = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """An added token may hold other characters: then it stands for itself."""
    found = [_ALPHABET.get(character) for character in token]
    known = [byte for byte in found if byte is not None]
    return bytes(known) if len(known) == len(found) else token.encode()


class _Window:
    """Any other decoder: a token depends on whether it is the first, so the one before it is
    decoded with it. Bytes in a row, spelled <0x0A>, are text together or not at all: they wait for
    the token that ends them."""

    def __init__(self, tokenizer: TextTokenizer, before: Iterable[int]) -> None:
        spelled = ((id, tokenizer.spelling(id)) for id in before)
        self._context = [id for id, token in spelled if token and not _is_byte(token)][:1]
        self._tokenizer, self._waiting = tokenizer, list[int]()

    def push(self, id: int, token: str) -> str:
        self._waiting.append(id)
        return "" if _is_byte(token) else self.finish()

    def finish(self) -> str:
        if not self._waiting:
            return ""
        given = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode([*self._context, *self._waiting])
        self._context, self._waiting = self._waiting[-1:], []
        return text[len(given) :]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
