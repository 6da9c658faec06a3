"""Outputs of the scheduler as OpenAI's objects, whole or in parts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from layersweep.generate.request import Finish, Output
from layersweep.text.tokenizer import TextTokenizer

LOWEST = -9999.0  # OpenAI's for a token that cannot be: JSON has no -inf


class Token(NamedTuple):
    """A chosen token beside the likeliest: texts and natural logarithms. `start`: where it begins
    in the answer, in characters."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    start: int


@dataclass
class Choice:
    """One sequence's answer, or the part of it that is sent next."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None


class Words:
    """Texts of single tokens."""

    def __init__(self, tokenizer: TextTokenizer, top: int | None) -> None:
        self.tokenizer, self.top = tokenizer, top
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """What it adds to a text. Twice less once, since some tokenizers strip a first blank."""
        if token not in self._texts:
            once = len(self.tokenizer.decode([token]))
            self._texts[token] = self.tokenizer.decode([token, token])[once:]
        return self._texts[token]

    def token(self, output: Output, start: int) -> list[Token]:
        """Of an output, where logprobs are asked for; none if it has no token."""
        if self.top is None or output.token is None:
            return []
        likeliest = output.top[: self.top]
        top = tuple((self.text(token), _finite(logprob)) for token, logprob in likeliest)
        return [Token(self.text(output.token), _finite(output.logprob), top, start)]


def one_line(content: dict[str, Any]) -> str:
    """JSON on one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > LOWEST else LOWEST


class Style(Protocol):
    """How an endpoint spells an answer. `continues`: as in generate.request.Request."""

    prefix: str
    continues: bool
    whole_object: str
    part_object: str

    def whole(self, choice: Choice) -> dict[str, Any]:
        """Of a finished sequence, without index and logprobs."""

    def part(self, choice: Choice) -> dict[str, Any]:
        """Of what is sent next."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a sequence before its first token."""

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]: ...


class CompletionStyle:
    prefix, continues = "cmpl", True
    whole_object = part_object = "text_completion"

    def whole(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text}

    part = whole

    def opening(self, index: int) -> None:
        return None

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": [token.start for token in tokens],
        }


class ChatStyle:
    prefix, continues = "chatcmpl", False
    whole_object, part_object = "chat.completion", "chat.completion.chunk"

    def whole(self, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def part(self, choice: Choice) -> dict[str, Any]:
        return {"delta": {"content": choice.text} if choice.text else {}}

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **_chat_token(token.text, token.logprob),
                    "top_logprobs": [_chat_token(*likely) for likely in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    """`bytes` is null for a token that is part of a character."""
    raw = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": raw}


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int

    @property
    def content(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True)
class Speller:
    """Spells the answer to one HTTP request. `name`: of the model."""

    style: Style
    id: str
    name: str
    words: Words
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        spelled = [self._choice(choice, self.style.whole(choice)) for choice in choices]
        return {**self._head(self.style.whole_object, spelled), "usage": usage.content}

    def part(self, choice: Choice) -> dict[str, Any]:
        """One chunk of a stream."""
        spelled = self._choice(choice, self.style.part(choice))
        return self._head(self.style.part_object, [spelled])

    def opening(self, index: int) -> dict[str, Any] | None:
        opening = self.style.opening(index)
        return self._head(self.style.part_object, [opening]) if opening else None

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream that was asked to have it."""
        return {**self._head(self.style.part_object, []), "usage": usage.content}

    def _choice(self, choice: Choice, spelled: dict[str, Any]) -> dict[str, Any]:
        shown = self.words.top is not None
        logprobs = self.style.logprobs(choice.tokens) if shown and choice.tokens else None
        own = {"index": choice.index, "logprobs": logprobs, "finish_reason": choice.finish}
        return {**own, **spelled}

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }
