"""Tokens that stand beside tokenizer.json: in tokenizer_config.json and in two older files.

transformers adds them when it loads a tokenizer; what follows are its rules (5.24), and a test
asks transformers over a grid. Their ids are not those that the files name: a token that the
vocabulary lacks gets the next free id, in the order of the files' ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from layersweep.errors import InputError

NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokensBeside:
    """`named`: bos_token, eos_token, ..., and a model's own such as image_token. `numbered`: those
    for which a file names an id."""

    named: dict[str, AddedToken]
    extra: tuple[AddedToken, ...]
    numbered: dict[int, AddedToken]

    @staticmethod
    def of(
        settings: Mapping[str, Any],
        special_map: Mapping[str, Any],
        added: Mapping[str, Any],
        own: Mapping[int, AddedToken],
    ) -> TokensBeside:
        """What transformers makes of tokenizer_config.json, special_tokens_map.json and
        added_tokens.json, beside the `own` added tokens of tokenizer.json.

        The older two files count only where the first has no added_tokens_decoder. Raises
        InputError for an entry that is no token.
        """
        given = dict(settings)
        if "additional_special_tokens" in given and not given.get("extra_special_tokens"):
            given["extra_special_tokens"] = given.pop("additional_special_tokens")
        models_own = {name: given.pop(name) for name in _names_of_a_models_own(given)}
        if isinstance(given.get("extra_special_tokens"), dict):
            models_own |= given.pop("extra_special_tokens")
        if "added_tokens_decoder" in given:
            numbered = _numbered(given["added_tokens_decoder"])
        else:
            models_own |= _merge(given, special_map)
            numbered = _numbered_by_older_file(added, _special_contents(given)) | dict(own)
        if "additional_special_tokens" in given and "extra_special_tokens" not in given:
            given["extra_special_tokens"] = given["additional_special_tokens"]
        names = [*(name for name in NAMED if given.get(name)), *_names_of_a_models_own(given)]
        by_content = {token.content: token for token in numbered.values()}
        named = {name: _token(given[name], name) for name in names} | {
            name: _token(value, name) for name, value in models_own.items()
        }
        for name in named.keys() & set(NAMED):
            named[name] = by_content.get(named[name].content, named[name])
        extra = given.get("extra_special_tokens") or []
        if not isinstance(extra, list):
            raise _no_token("extra_special_tokens", extra)
        return TokensBeside(
            named, tuple(_token(value, "extra_special_tokens") for value in extra), numbered
        )

    def add_to(self, tokenizer: Tokenizer) -> list[AddedToken]:
        """Add those that `tokenizer` lacks; they are what is returned."""
        own = tokenizer.get_added_tokens_decoder()
        alike = {repr(token) for token in own.values()}
        wanted = [t for _, t in sorted(self.numbered.items()) if repr(t) not in alike]
        known = {token.content for token in [*own.values(), *wanted]}
        wanted += [t for t in [*self.named.values(), *self.extra] if t.content not in known]
        special = {token.content for token in self.named.values()}
        for token in wanted:
            token.special = token.special or token.content in special
        tokenizer.add_tokens(wanted)
        return wanted

    def misnumbered(self, tokenizer: Tokenizer) -> list[str]:
        """Sentences on tokens that have another id than a file names."""
        return [
            f"'{token.content}' has id {tokenizer.token_to_id(token.content)} as transformers "
            f"numbers it, the file says {number}"
            for number, token in sorted(self.numbered.items())
            if tokenizer.token_to_id(token.content) != number
        ]


def _names_of_a_models_own(given: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in given.items()
        if name.endswith("_token") and name not in NAMED and isinstance(value, str | AddedToken)
    ]


def _merge(given: dict[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json goes before tokenizer_config.json. Returns a model's own tokens."""
    for name, value in special_map.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            before = list(given.get(name) or [])
            given[name] = [*before, *(token for token in value if token not in before)]
        elif isinstance(value, dict) and name != "extra_special_tokens":
            given[name] = _token(value | {"special": True}, name)
        else:
            given[name] = value
    extra = given.get("extra_special_tokens")
    return given.pop("extra_special_tokens") if isinstance(extra, dict) else {}


def _special_contents(given: Mapping[str, Any]) -> set[str]:
    values = [given.get(name) for name in NAMED] + list(given.get("extra_special_tokens") or [])
    return {
        value.content if isinstance(value, AddedToken) else value
        for value in values
        if isinstance(value, str | AddedToken)
    }


def _numbered(entries: Any) -> dict[int, AddedToken]:
    if not isinstance(entries, dict):
        raise _no_token("added_tokens_decoder", entries)
    numbered = {}
    for number, entry in entries.items():
        if not number.isdecimal() or not isinstance(entry, dict):
            raise _no_token("added_tokens_decoder", {number: entry})
        numbered[int(number)] = _token(entry, "added_tokens_decoder", special=False)
    return numbered


def _numbered_by_older_file(added: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    numbered = {}
    for content, number in added.items():
        if type(number) is not int or not content:
            raise _no_token("added_tokens.json", {content: number})
        numbered[number] = AddedToken(
            content, special=content in special, normalized=content not in special
        )
    return numbered


def _token(value: Any, place: str, special: bool = True) -> AddedToken:
    """`special`: of an entry that does not say it."""
    if isinstance(value, AddedToken):
        return value
    entry = {"content": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise _no_token(place, value)
    flags = {name: entry[name] for name in FLAGS if name in entry}
    if not entry["content"] or not all(isinstance(flag, bool) for flag in flags.values()):
        raise _no_token(place, value)
    return AddedToken(entry["content"], **({"special": special} | flags))


def _no_token(place: str, found: Any) -> InputError:
    return InputError(
        f"tokenizer_config.json: {place}: found {str(found)[:80]!r}, needed a token",
        hint="download the tokenizer's files again",
    )
