"""A checkpoint's tokenizer: text to ids and back, without ever adding or parsing tokens.

``tokenizer.json`` is read by the tokenizers library alone; transformers, which takes seconds
to import, serves only folders that have no such file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from layersweep.errors import InputError

SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer whose `encode` gives the text's own tokens and nothing else.

    `bos_by_default`: the tokenizer's default call puts `bos_id` first. `sha256` is over
    tokenizer.json. `notes` are sentences that the run has to announce (fallbacks taken).
    """

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
        data, notes = _tokenizer_json(folder)
        settings = _read_json(folder / "tokenizer_config.json")
        tokenizer = _build(data, folder / "tokenizer.json", parse_special=False)
        bos_id, bos_by_default = _find_bos(folder, tokenizer, settings)
        template = _read_chat_template(folder, settings)
        return cls(
            tokenizer=tokenizer,
            parser=_build(data, folder / "tokenizer.json", parse_special=True)
            if template
            else None,
            vocab_size=tokenizer.get_vocab_size(),
            sha256=hashlib.sha256(data).hexdigest(),
            bos_id=bos_id,
            bos_by_default=bos_by_default,
            chat_template=template,
            chat_tokens=_special_strings(folder, settings),
            notes=notes,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. No special token is added; "</s>" in the text stays text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with each token's (first, last + 1) character in `text`."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_chat(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_with_offsets`, for rendered chat: special tokens in `text` are parsed.

        Nothing is added. Text that is not the template's own must be checked with
        `holds_special` before it is put into a chat.
        """
        if self.parser is None:
            raise InputError("tokenizer: found no chat template, needed one to encode a chat")
        encoding: Encoding = self.parser.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def holds_special(self, text: str) -> bool:
        """Whether `text` spells a special token, which a rendered chat would turn into one."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return any(token.special and token.content in text for token in added)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def render_chat(self, user_text: str) -> str:
        """One user message through the chat template, up to where the answer starts.

        Raises InputError without a template, or where the template refuses the message.
        """
        if self.chat_template is None:
            raise InputError("tokenizer: found no chat template, needed one to render a chat")
        return _render(self.chat_template, user_text, self.chat_tokens)


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
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower than Exception
        raise InputError(
            f"{path}: found no readable tokenizer ({error}), needed a tokenizers JSON file",
            hint="download the file again",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer


def _tokenizer_json(folder: Path) -> tuple[bytes, tuple[str, ...]]:
    """tokenizer.json's bytes: the file's, or converted by transformers where it is absent."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_bytes(), ()
    others = [name for name in SLOW_TOKENIZER_FILES if (folder / name).is_file()]
    if not others:
        raise InputError(
            f"{path}: found no such file, needed the checkpoint's tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json next to the weights",
        )
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(folder, local_files_only=True)
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


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is absent."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: found no readable JSON ({error}), needed an object",
            hint="download the file again",
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: found a {type(found).__name__}, needed a JSON object")
    return found


def _special_strings(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as strings; either file may hold them, plain or as objects."""
    merged = _read_json(folder / "special_tokens_map.json") | settings
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = merged.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _find_bos(
    folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]
) -> tuple[int | None, bool]:
    """(id of BOS, whether the default call puts it first)."""
    name = _special_strings(folder, settings).get("bos_token")
    bos_id = tokenizer.token_to_id(name) if name is not None else None
    if bos_id is None:
        configured = _read_json(folder / "config.json").get("bos_token_id")
        bos_id = configured if isinstance(configured, int) else None
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


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the tokenizer_config's (of a named list, "default")."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _render(template: str, user_text: str, tokens: dict[str, str]) -> str:
    """The template in Jinja's sandbox, with the settings that published templates rely on."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        # a prompt must not change with the day it is run on
        return datetime(2024, 7, 26).strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    messages = [{"role": "user", "content": user_text}]
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **tokens
        )
    except TemplateError as error:
        raise InputError(
            f"chat template: found an error ({error}), needed one user message rendered",
            hint="repair chat_template in tokenizer_config.json, or remove it",
        ) from error
