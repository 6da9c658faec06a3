"""A checkpoint's tokenizer: text to ids and back, without ever adding or parsing tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import Unigram

from layersweep.checkpoint.storage.ggml import SUFFIX
from layersweep.errors import InputError
from layersweep.text.added_tokens import TokensBeside
from layersweep.text.chat import Message, render_chat
from layersweep.text.tokenizer_files import TokenizerFiles

MOST_GROWTH = 64  # published ones replace a character by one of three bytes


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer whose `encode` gives the text's own tokens and nothing else.

    `bos_by_default`: the tokenizer's default call puts `bos_id` first. `sha256` is over
    tokenizer.json and the tokens that other files add to it. `notes` are sentences that the run
    has to announce: fallbacks taken, and files that disagree.
    """

    file: Path
    tokenizer: Tokenizer = field(repr=False)
    parser: Tokenizer | None = field(repr=False)
    sha256: str
    bos_id: int | None
    bos_by_default: bool
    chat_template: str | None
    chat_tokens: dict[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read the tokenizer of a checkpoint: of a folder, or in a GGUF file.

        Raises InputError, naming the file, where one is missing or damaged.
        """
        files = read_tokenizer_files(folder)
        path = files.path
        tokenizer = _build(files.data, path, parse_special=False)
        own = tokenizer.get_added_tokens_decoder()
        beside = TokensBeside.of(files.settings, files.special_map, files.added, own)
        with _library_errors(path):
            added = [] if files.converted else beside.add_to(tokenizer)
        parser = None
        if files.template is not None:
            parse_special = files.settings.get("split_special_tokens") is not True
            parser = _build(files.data, path, parse_special=parse_special)
            parser.add_tokens(added)
        chat_tokens = {name: token.content for name, token in beside.named.items()}
        bos_id, bos_by_default = _find_bos(files, tokenizer, chat_tokens.get("bos_token"))
        notes = [*files.notes, *beside.misnumbered(tokenizer)]
        setting = files.settings.get("add_bos_token")
        if not files.converted and bos_id is not None and setting is (not bos_by_default):
            does = "puts it first" if bos_by_default else "does not"
            notes.append(
                f"tokenizer_config.json says add_bos_token {setting}, tokenizer.json {does} and is "
                "followed, as by transformers from 5.0 on; see --bos"
            )
        return cls(
            file=path,
            tokenizer=tokenizer,
            parser=parser,
            sha256=_fingerprint(files.data, added),
            bos_id=bos_id,
            bos_by_default=bos_by_default,
            chat_template=files.template,
            chat_tokens=chat_tokens,
            notes=tuple(f"tokenizer: {note}" for note in notes),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. No special token is added; "</s>" in the text stays text."""
        return self._encode(self.tokenizer, text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with each token's (first, last + 1) character in `text`."""
        encoding = self._encode(self.tokenizer, text)
        return encoding.ids, encoding.offsets

    def encode_with_words(self, text: str) -> Encoding:
        """As `encode`, as the library has it: also to which word of the pre-tokenizer, if there is
        one, each token belongs."""
        return self._encode(self.tokenizer, text)

    @property
    def weighs_words(self) -> bool:
        """Whether it weighs all ways to split a word: the first token depends on the last then."""
        return isinstance(self.tokenizer.model, Unigram)

    def encode_chat(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_with_offsets`, for rendered chat: special tokens in `text` are parsed.

        Nothing is added. Text that is not the template's own must be checked with
        `holds_special` before it is put into a chat.
        """
        if self.parser is None:
            raise InputError("tokenizer: found no chat template, needed one to encode a chat")
        encoding = self._encode(self.parser, text)
        return encoding.ids, encoding.offsets

    def _encode(self, tokenizer: Tokenizer, text: str) -> Encoding:
        with _library_errors(self.file):
            return tokenizer.encode(text, add_special_tokens=False)

    def holds_special(self, text: str) -> bool:
        """Whether `text` spells a special token, which a rendered chat would turn into one."""
        return any(token in text for token in self._special.values())

    def spelling(self, id: int) -> str | None:
        """The token as the vocabulary spells it; None if it is special, or there is none."""
        return None if id in self._special else self.tokenizer.id_to_token(id)

    @cached_property
    def joins_bytes(self) -> bool:
        """Whether tokens spell bytes in GPT-2's alphabet, and text is their bytes in a row."""
        decoder = self.tokenizer.decoder
        return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"

    @cached_property
    def _special(self) -> dict[int, str]:
        added = self.tokenizer.get_added_tokens_decoder()
        return {id: token.content for id, token in added.items() if token.special}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out."""
        with _library_errors(self.file):
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Messages through the chat template, up to where the next answer starts.

        Raises InputError without a template, or where the template refuses the messages.
        """
        if self.chat_template is None:
            raise InputError(
                "tokenizer: found no chat template, needed one to render a chat",
                hint="the model continues plain text; chats need an instruction-tuned model with "
                "chat_template in its tokenizer_config.json, or chat_template.jinja",
            )
        return render_chat(self.chat_template, messages, self.chat_tokens)

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the next answer starts, as transformers gives them, but for
        special tokens that a message spells: those stay text.

        Raises InputError without a template, or where the template refuses the messages.
        """
        said = "".join(message.content for message in messages)
        spelled = sorted({token for token in self._special.values() if token in said}, key=len)
        if not spelled:
            return self.encode_chat(self.render_chat(messages))[0]
        # each is a number between two marks while the template is rendered
        used = said + (self.chat_template or "")
        mark = next((char for char in map(chr, range(0xE000, 0xF900)) if char not in used), None)
        if mark is None:
            raise InputError(
                "messages: found every private character of Unicode (U+E000 to U+F8FF) and a "
                "special token, needed one such character that is not there",
                hint="leave out one of them, or the special token",
            )
        any_spelled = re.compile("|".join(map(re.escape, reversed(spelled))))  # the longest first

        def hide(content: str) -> str:
            return any_spelled.sub(lambda m: f"{mark}{spelled.index(m[0])}{mark}", content)

        rendered = self.render_chat([replace(m, content=hide(m.content)) for m in messages])
        ids: list[int] = []
        for place, part in enumerate(re.split(f"{mark}([0-9]+){mark}", rendered)):
            ids += self.encode(spelled[int(part)]) if place % 2 else self.encode_chat(part)[0]
        return ids


def read_tokenizer_files(place: Path) -> TokenizerFiles:
    """Raises InputError, naming file or key, where one is missing or damaged."""
    if place.suffix == SUFFIX and place.is_file():
        from layersweep.text.gguf import read_gguf_tokenizer

        return read_gguf_tokenizer(place)
    return TokenizerFiles.read(place)


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raise InputError if the text has a token that the model has no embedding for."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InputError(
            f"text: found token id {largest}, needed ids below the model's vocabulary "
            f"of {vocab_size}",
            hint="the tokenizer does not belong to this checkpoint, or the text spells a token "
            "that was added after training: use the model's own tokenizer files or another --text",
        )


def hash_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian uint32: equal exactly when the tokens are."""
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).hexdigest()


def _build(data: bytes, path: Path, *, parse_special: bool) -> Tokenizer:
    with _library_errors(path):
        tokenizer = Tokenizer.from_buffer(data)
    _check_growth(tokenizer, path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer


@contextmanager
def _library_errors(path: Path) -> Iterator[None]:
    """What the tokenizers library raises as an InputError: nothing narrower than Exception, and
    not even that where its Rust code panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{path}: found no readable tokenizer ({error}), needed a tokenizers JSON file",
            hint="download the file again",
        ) from error


def _check_growth(tokenizer: Tokenizer, path: Path) -> None:
    """Replacements one after the other multiply a text: five of 20 characters by 3 million."""
    for part in (tokenizer.normalizer, tokenizer.decoder):
        growth, waiting = 1, [json.loads(part.__getstate__())] if part else []
        while waiting:
            step = waiting.pop()
            waiting += step.get("normalizers", []) + step.get("decoders", [])
            if step["type"] == "Replace":
                beside = step["pattern"].get("String") in (None, "")  # may match nothing, anywhere
                growth *= max(1, len(step["content"]) + beside)
        if growth > MOST_GROWTH:
            raise InputError(
                f"{path}: found replacements that make a text {growth} times as long, needed at "
                f"most {MOST_GROWTH}",
                hint="the tokenizer would fill the memory: do not use this checkpoint",
            )


def _fingerprint(data: bytes, added: list[AddedToken]) -> str:
    return hashlib.sha256(data + "".join(map(repr, added)).encode()).hexdigest()


def _find_bos(
    files: TokenizerFiles, tokenizer: Tokenizer, name: str | None
) -> tuple[int | None, bool]:
    """(id of BOS, whether the default call puts it first): tokenizer.json's post-processor does."""
    bos_id = tokenizer.token_to_id(name) if name is not None else None
    if bos_id is None:
        configured = files.config.get("bos_token_id")
        bos_id = configured if isinstance(configured, int) else None
    with _library_errors(files.path):
        called = tokenizer.encode("a", add_special_tokens=True)
    puts_first = bool(called.ids) and called.special_tokens_mask[0] == 1
    if bos_id is None and puts_first:
        bos_id = called.ids[0]
    return bos_id, puts_first and called.ids[0] == bos_id
