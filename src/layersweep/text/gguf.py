"""The tokenizer in a GGUF file's metadata, as the files of a checkpoint that say the same.

    tokenizer.ggml.model "gpt2": byte-level BPE, split first as tokenizer.ggml.pre says
    tokenizer.ggml.model "llama": SentencePiece, pieces with scores, which become merges

What is made is a tokenizer.json, which the tokenizers library reads as it reads a published one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from layersweep.checkpoint.gguf.header import Value
from layersweep.checkpoint.gguf.opening import read_files
from layersweep.errors import InputError
from layersweep.problems import problems_error, show
from layersweep.text.splits import BEGIN_WITH_BOS, SPLITS, WHOLE_WORDS
from layersweep.text.tokenizer_files import TokenizerFiles

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
SPACE = "\u2581"  # how SentencePiece spells one
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours, theirs
HINT = "give a folder with the model's own tokenizer.json beside safetensors"


def read_gguf_tokenizer(path: Path) -> TokenizerFiles:
    """Raises InputError, naming the key, for a tokenizer that is missing or cannot be made."""
    try:
        files = read_files(path)
    except OSError as error:
        raise InputError(f"{path}: found {error}, needed a readable file") from error
    if files.problems:
        raise problems_error(files.problems)
    words = GgufWords(str(path), files.fields)
    made = words.tokenizer_json()
    settings = words.settings()
    template = settings.get("chat_template")
    return TokenizerFiles(
        folder=path,
        data=json.dumps(made, ensure_ascii=False).encode(),
        converted=True,
        settings=settings,
        special_map={},
        added={},
        config={},
        template=template,
        notes=(),
    )


@dataclass(frozen=True)
class GgufWords:
    """What the metadata of `file` say of its tokenizer. Raises InputError, naming the key, for what
    is missing or wrong."""

    file: str
    fields: Mapping[str, Value]

    def _wrong(self, key: str, found: object, needed: str) -> InputError:
        name = key if "." in key else PREFIX + key
        return InputError(f"{self.file}: {name}: found {show(found)}, needed {needed}", hint=HINT)

    def _list(self, key: str, kind: type) -> list[Any]:
        found = self.fields.get(PREFIX + key)
        if not isinstance(found, list) or not all(type(one) is kind for one in found):
            raise self._wrong(key, found, f"a list of {kind.__name__}")
        return found

    def _flag(self, key: str, default: bool) -> bool:
        found = self.fields.get(PREFIX + key, default)
        if not isinstance(found, bool):
            raise self._wrong(key, found, "true or false")
        return found

    @cached_property
    def tokens(self) -> list[str]:
        """SentencePiece's own spelling of spaces, which the converter takes from some."""
        found: list[str] = self._list("tokens", str)
        if self.model == "gpt2":
            return found
        return [token.replace(" ", SPACE) for token in found]

    @cached_property
    def kinds(self) -> list[int]:
        found: list[int] = self._list("token_type", int)
        if len(found) != len(self.tokens):
            raise self._wrong("token_type", f"{len(found)} kinds", f"{len(self.tokens)}, as tokens")
        return found

    @property
    def added(self) -> Iterator[tuple[int, str, int]]:
        """Tokens that are found in a text before it is split: number, spelling, kind. Runs of
        spaces are none, since a text's spaces are respelled first."""
        kinds = (UNKNOWN, CONTROL, USER_DEFINED)
        for number, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind in kinds and token.strip(SPACE if self.model == "llama" else ""):
                yield number, token, kind

    @property
    def model(self) -> str:
        found = self.fields.get(f"{PREFIX}model")
        if found not in ("gpt2", "llama"):
            raise self._wrong("model", found, "gpt2 or llama")
        return str(found)

    @property
    def pre(self) -> str:
        """How text is split before BPE."""
        found = self.fields.get(f"{PREFIX}pre")
        if not isinstance(found, str) or found not in SPLITS:
            raise self._wrong("pre", found, f"one of {', '.join(SPLITS)}")
        return found

    def named(self, name: str) -> str | None:
        """The token that is called bos, eos, unk or pad."""
        key = f"{NAMES[name]}_token_id"
        number = self.fields.get(PREFIX + key)
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            raise self._wrong(key, number, f"an id below {len(self.tokens)}")
        return self.tokens[number]

    def adds(self, name: str) -> bool:
        """Whether the default call puts bos or eos around a text."""
        default = name == "bos" and (self.model == "llama" or self.pre in BEGIN_WITH_BOS)
        return self._flag(f"add_{name}_token", default)

    def settings(self) -> dict[str, Any]:
        """As tokenizer_config.json says it."""
        found: dict[str, Any] = {
            f"{name}_token": token for name in NAMES if (token := self.named(name)) is not None
        }
        template = self.fields.get("tokenizer.chat_template")
        if template is not None:
            if not isinstance(template, str):
                raise self._wrong("tokenizer.chat_template", template, "text")
            found["chat_template"] = template
        return found

    def tokenizer_json(self) -> dict[str, Any]:
        parts = self._bytes() if self.model == "gpt2" else self._pieces()
        added = [
            {
                "id": number, "content": token, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": kind in (UNKNOWN, CONTROL),
            }
            for number, token, kind in self.added
        ]  # fmt: skip
        frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        return frame | parts | {"post_processor": self._around()}

    def _bytes(self) -> dict[str, Any]:
        merges = [merge.split(" ", 1) for merge in self._list("merges", str)]
        for index, merge in enumerate(merges):
            if len(merge) != 2:
                raise self._wrong("merges", f"{show(merge[0])} at {index}", "two tokens")
        normalizer, pre_tokenizer = SPLITS[self.pre]
        model = self._bpe(merges) | {"ignore_merges": self.pre in WHOLE_WORDS}
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        return {
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "decoder": bytes_ | {"use_regex": False},
            "model": model,
        }

    def _pieces(self) -> dict[str, Any]:
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            needed = f"{len(self.tokens)}, as tokens"
            raise self._wrong("scores", f"{len(scores)} scores", needed)
        space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        steps: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
        normalizer: dict[str, Any] = space
        pre_tokenizer = None
        if self._flag("add_space_prefix", True):
            prepend = {"type": "Prepend", "prepend": SPACE}
            normalizer = {"type": "Sequence", "normalizers": [prepend, space]}
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        else:
            split = {"type": "Split", "pattern": {"String": " "}, "invert": False}
            pre_tokenizer = split | {"behavior": "MergedWithPrevious"}
        unknown = {"unk_token": self.named("unk"), "fuse_unk": True, "byte_fallback": True}
        return {
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "decoder": {"type": "Sequence", "decoders": steps},
            "model": self._bpe(merges_of(self.tokens, scores, self.kinds)) | unknown,
        }

    def _bpe(self, merges: Sequence[Sequence[str]]) -> dict[str, Any]:
        vocabulary: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            vocabulary.setdefault(token, number)
        return {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocabulary, "merges": merges,
        }  # fmt: skip

    def _around(self) -> dict[str, Any] | None:
        """What the default call puts around a text."""
        ends = {name: self.named(name) for name in ("bos", "eos") if self.adds(name)}
        put = {name: token for name, token in ends.items() if token is not None}
        if not put:
            return None
        text: list[Any] = [{"Sequence": {"id": "A", "type_id": 0}}]
        mark = {name: {"SpecialToken": {"id": token, "type_id": 0}} for name, token in put.items()}
        single = [*([mark["bos"]] if "bos" in mark else []), *text]
        single += [mark["eos"]] if "eos" in mark else []
        tokens = {
            token: {"id": token, "ids": [self.tokens.index(token)], "tokens": [token]}
            for token in put.values()
        }
        return {
            "type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": tokens,
        }  # fmt: skip


def merges_of(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece's pieces as merges: it always merges the two neighbours whose piece scores
    highest, so every way to cut a piece in two known ones is a merge, the best pieces' first. It
    takes those that users defined before all others, whatever score the converter gave them."""
    find = {token: number for number, token in enumerate(tokens)}.get
    merged: list[int] = []
    halves: list[tuple[int, int]] = []
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (UNKNOWN, CONTROL, BYTE):
            continue
        for at in range(1, len(token)):
            first = find(token[:at])
            second = None if first is None else find(token[at:])
            if first is not None and second is not None:
                merged.append(number)
                halves.append((first, second))
    own, pairs = np.array(merged, np.int64), np.array(halves, np.int64).reshape(-1, 2)
    before_all = np.array(kinds)[own] == USER_DEFINED
    ranks = np.where(before_all, -np.inf, -np.array(scores)[own])
    sizes = np.array([len(token) for token in tokens])[pairs]
    keys = (*pairs.T[::-1], *-sizes.T[::-1], np.where(before_all, own, 0), ranks)
    order = np.lexsort(keys).tolist()  # the last key decides first
    return [(tokens[halves[index][0]], tokens[halves[index][1]]) for index in order]
