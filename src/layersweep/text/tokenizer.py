"""A checkpoint's tokenizer: text to ids and back, without ever adding or parsing tokens.

``tokenizer.json`` is read by the tokenizers library alone; transformers, which takes seconds
to import, serves only folders that have no such file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from layersweep.checkpoint.files import LocalFolder, read_small
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import InputError
from layersweep.text.chat import render

MOST_GROWTH = 64  # published ones replace a character by one of three bytes
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer whose `encode` gives the text's own tokens and nothing else.

    `bos_by_default`: the tokenizer's default call puts `bos_id` first. `sha256` is over
    tokenizer.json. `notes` are sentences that the run has to announce (fallbacks taken).
    """

    file: Path
    tokenizer: Tokenizer = field(repr=False)
    parser: Tokenizer | None = field(repr=False)
    vocab_size: int
    sha256: str
    bos_id: int | None
    bos_by_default: bool
    chat_template: str | None
    chat_tokens: dict[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read the tokenizer of a checkpoint folder.

        Raises InputError, naming the file, where one is missing or damaged.
        """
        if not folder.is_dir():
            raise InputError(
                f"tokenizer: found no folder {folder}, needed one with tokenizer.json",
                hint="give the folder of a checkpoint, or its hub id",
            )
        files = LocalFolder.at(folder)
        settings = _read_json(files, "tokenizer_config.json")
        data, notes = _tokenizer_json(files, settings)
        tokenizer = _build(data, folder / "tokenizer.json", parse_special=False)
        bos_id, bos_by_default = _find_bos(files, tokenizer, settings)
        template = _read_chat_template(files, settings)
        return cls(
            file=folder / "tokenizer.json",
            tokenizer=tokenizer,
            parser=_build(data, folder / "tokenizer.json", parse_special=True)
            if template
            else None,
            vocab_size=tokenizer.get_vocab_size(),
            sha256=hashlib.sha256(data).hexdigest(),
            bos_id=bos_id,
            bos_by_default=bos_by_default,
            chat_template=template,
            chat_tokens=_special_strings(files, settings),
            notes=notes,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. No special token is added; "</s>" in the text stays text."""
        return self._encode(self.tokenizer, text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with each token's (first, last + 1) character in `text`."""
        encoding = self._encode(self.tokenizer, text)
        return encoding.ids, encoding.offsets

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
        added = self.tokenizer.get_added_tokens_decoder().values()
        return any(token.special and token.content in text for token in added)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out."""
        with _library_errors(self.file):
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def render_chat(self, user_text: str) -> str:
        """One user message through the chat template, up to where the answer starts.

        Raises InputError without a template, or where the template refuses the message.
        """
        if self.chat_template is None:
            raise InputError("tokenizer: found no chat template, needed one to render a chat")
        return render(self.chat_template, user_text, self.chat_tokens)


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


def _tokenizer_json(files: LocalFolder, settings: dict[str, Any]) -> tuple[bytes, tuple[str, ...]]:
    """tokenizer.json's bytes: the file's, or converted by transformers where it is absent."""
    folder, names = files.folder, files.names()
    path = folder / "tokenizer.json"
    if "tokenizer.json" in names:
        return read_small(files, "tokenizer.json"), ()
    others = [name for name in SLOW_TOKENIZER_FILES if name in names]
    if not others:
        raise InputError(
            f"{path}: found no such file, needed the checkpoint's tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json next to the weights",
        )
    if "auto_map" in settings | _read_json(files, "config.json"):
        raise InputError(
            f"{path}: found no such file, but auto_map: a tokenizer that is the checkpoint's own "
            "code, needed tokenizer.json",
            hint="a checkpoint's code is never run; let its author save a tokenizer.json",
        )
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{folder / others[0]}: found no tokenizer that transformers can read ({error}), "
            "needed tokenizer.json",
            hint="copy tokenizer.json next to the weights",
        ) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{folder / others[0]}: found a tokenizer without a fast version, "
            "needed tokenizer.json",
            hint="convert it with transformers and save tokenizer.json next to the weights",
        )
    note = f"tokenizer: no tokenizer.json, converted from {others[0]} by transformers"
    return backend.to_str().encode(), (note,)


def _read_json(files: LocalFolder, name: str) -> dict[str, Any]:
    """A JSON object, empty where the file is absent."""
    if name not in files.names():
        return {}
    path = files.folder / name
    try:
        found, _ = parse_json(read_small(files, name))
    except UnusableJson as error:
        raise InputError(
            f"{path}: found {error}, needed a JSON object", hint="download the file again"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: found a {type(found).__name__}, needed a JSON object")
    return found


def _special_strings(files: LocalFolder, settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as strings; either file may hold them, plain or as objects."""
    merged = _read_json(files, "special_tokens_map.json") | settings
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = merged.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _find_bos(
    files: LocalFolder, tokenizer: Tokenizer, settings: dict[str, Any]
) -> tuple[int | None, bool]:
    """(id of BOS, whether the default call puts it first)."""
    name = _special_strings(files, settings).get("bos_token")
    bos_id = tokenizer.token_to_id(name) if name is not None else None
    if bos_id is None:
        configured = _read_json(files, "config.json").get("bos_token_id")
        bos_id = configured if isinstance(configured, int) else None
    with _library_errors(files.folder / "tokenizer.json"):
        called = tokenizer.encode("a", add_special_tokens=True)
    puts_first = bool(called.ids) and called.special_tokens_mask[0] == 1
    if bos_id is None and puts_first:
        bos_id = called.ids[0]
    by_default = puts_first and called.ids[0] == bos_id
    # transformers rebuilds the post-processor from this setting wherever it is given
    explicit = settings.get("add_bos_token")
    if isinstance(explicit, bool):
        by_default = explicit and bos_id is not None
    return bos_id, by_default


def _read_chat_template(files: LocalFolder, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the tokenizer_config's (of a named list, "default")."""
    name = "chat_template.jinja"
    if name in files.names():
        try:
            return read_small(files, name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{files.folder / name}: found no UTF-8 ({error}), needed a template",
                hint="download the file again",
            ) from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next(
            (one.get("template") for one in named if one.get("name") == "default"), None
        )
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{files.folder / 'tokenizer_config.json'}: found a chat_template that is no text, "
            "needed a template or a list of named ones",
            hint="repair chat_template in tokenizer_config.json, or remove it",
        )
    return template
