"""The files that make up a checkpoint's tokenizer, as transformers reads them.

``tokenizer.json`` is read by the tokenizers library alone; transformers, which takes seconds
to import, serves only folders that have no such file. For Mixtral it takes normalizer,
pre-tokenizer and post-processor from tokenizer.json, whatever tokenizer_class, add_prefix_space,
legacy or add_bos_token of tokenizer_config.json say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layersweep.checkpoint.files import LocalFolder, read_small
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import InputError

SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class TokenizerFiles:
    """`data`: tokenizer.json's bytes, the file's or, if `converted`, made of all that other files
    say. Absent files are empty. `notes`: fallbacks taken. `folder`: or a GGUF file."""

    folder: Path
    data: bytes
    converted: bool
    settings: dict[str, Any]
    special_map: dict[str, Any]
    added: dict[str, Any]
    config: dict[str, Any]
    template: str | None
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file that messages name."""
        return self.folder if self.folder.is_file() else self.folder / "tokenizer.json"

    @staticmethod
    def read(folder: Path) -> TokenizerFiles:
        """Raises InputError, naming the file, where one is missing or damaged."""
        if not folder.is_dir():
            raise InputError(
                f"tokenizer: found no folder {folder}, needed one with tokenizer.json",
                hint="give the folder of a checkpoint, or its hub id",
            )
        files = LocalFolder.at(folder)
        settings = _read_json(files, "tokenizer_config.json")
        config = _read_json(files, "config.json")
        data, converted_from = _tokenizer_json(files, settings | config)
        template, template_notes = _chat_template(files, settings)
        notes = [f"no tokenizer.json, converted from {converted_from} by transformers"]
        return TokenizerFiles(
            folder=folder,
            data=data,
            converted=converted_from is not None,
            settings=settings,
            special_map=_read_json(files, "special_tokens_map.json"),
            added=_read_json(files, "added_tokens.json"),
            config=config,
            template=template,
            notes=(*(notes if converted_from else ()), *template_notes),
        )


def _tokenizer_json(files: LocalFolder, settings: dict[str, Any]) -> tuple[bytes, str | None]:
    """(tokenizer.json's bytes, the file that they were converted from where it is absent)."""
    folder, names = files.folder, files.names()
    path = folder / "tokenizer.json"
    if "tokenizer.json" in names:
        return read_small(files, "tokenizer.json"), None
    others = [name for name in SLOW_TOKENIZER_FILES if name in names]
    if not others:
        raise InputError(
            f"{path}: found no such file, needed the checkpoint's tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json next to the weights",
        )
    if "auto_map" in settings:
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
    return backend.to_str().encode(), others[0]


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


def _chat_template(files: LocalFolder, settings: dict[str, Any]) -> tuple[str | None, list[str]]:
    """(The template for chats without tools or documents, why there is none).

    Template files go before tokenizer_config.json's, as in transformers: where there are
    files and none of them is the default, there is no default.
    """
    if TEMPLATE_FILE in files.names():
        try:
            return read_small(files, TEMPLATE_FILE).decode("utf-8"), []
        except UnicodeDecodeError as error:
            raise InputError(
                f"{files.folder / TEMPLATE_FILE}: found no UTF-8 ({error}), needed a template",
                hint="download the file again",
            ) from error
    named = _named_template_files(files)
    template = None if named else settings.get("chat_template")
    if isinstance(template, list):
        of = {entry["name"]: entry.get("template") for entry in template if _is_named(entry)}
        named, template = list(of), of.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{files.folder / 'tokenizer_config.json'}: found a chat_template that is no text, "
            "needed a template or a list of named ones",
            hint="repair chat_template in tokenizer_config.json, or remove it",
        )
    lacking = template is None and bool(named)
    note = f"no default chat template beside {', '.join(sorted(named))}: prompts are plain text"
    return template, [note] if lacking else []


def _is_named(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def _named_template_files(files: LocalFolder) -> list[str]:
    """Names of the templates for special purposes: tool_use, rag and so on."""
    folder = files.root / NAMED_TEMPLATES
    if not folder.is_dir():
        return []
    return [name for name in os.listdir(folder) if name.endswith(".jinja")]
