"""The bodies of requests: OpenAI's names, and transformers' where OpenAI has none.

Every name is read, refused or said to be without effect: none is passed over in silence. null
means absent, as clients send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from layersweep.generate.request import Sampling
from layersweep.problems import show
from layersweep.serve.refusal import UNSUPPORTED

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_LOGPROBS = 128, 256, 16, 20
MOST_STOP_CHARACTERS = 1024
LARGEST_SEED = 2**62  # n choices count on from it, and stay 64-bit
COMPLETION_TOKENS = 16  # OpenAI's default; a chat's is what the model has room for

# Names for whoever calls. No answer depends on them, here or at OpenAI.
LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier"}
# What is known and not served, with the values that ask for nothing.
UNSERVED: Mapping[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}
UNSERVED_COMPLETION = {**UNSERVED, "echo": (False,), "best_of": (1,), "suffix": ("",)}
UNSERVED_CHAT = {
    **UNSERVED,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
UNSERVED_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "audio": (),
}


class Part(BaseModel):
    """A base: strict, and knows what it does not take."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    unserved: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    labels: ClassVar[set[str]] = set()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: object) -> object:
        """Leaves out null, labels, and what asks for nothing; refuses what is not served."""
        if not isinstance(given, dict):
            return given
        known = {*cls.model_fields, *cls.unserved}
        kept = {}
        for name, value in given.items():
            if name in cls.labels or (value is None and name in known):
                continue
            neutral = cls.unserved.get(name)
            if neutral is None:
                kept[name] = value
            elif value not in neutral:
                raise PydanticCustomError(
                    UNSUPPORTED, "{param}: found {found}, which is not served; leave it out",
                    {"param": name, "found": show(value)},
                )  # fmt: skip
        return kept


class StreamOptions(Part):
    labels = {"include_obfuscation"}
    include_usage: bool = False


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> list[str | list[int]]:
    """Text, token ids, or a list of either."""
    prompts: list[Any] = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not prompts or not all(_is_ids(one) or _is_text(one) for one in prompts):
        raise ValueError("needed text, token ids, or a list of texts or of lists of token ids")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"found {len(prompts)} prompts, needed at most {MOST_PROMPTS}")
    return prompts


def _is_ids(value: object) -> bool:
    """Not empty: a list of nothing is no prompt."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _is_text(value: object) -> bool:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


class Body(Part):
    """What completions and chats share."""

    labels = LABELS
    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]],
        BeforeValidator(_listed),
        Field(max_length=MOST_STOPS),
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    kv: str | None = None
    ignore_eos: bool = False

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are shown beside each; None where logprobs are not."""
        raise NotImplementedError

    def sampling(self, own: Sampling, max_new_tokens: int, choice: int) -> Sampling:
        """How choice 0 <= `choice` < n is sampled, as `own` says where the body does not. Choices
        of one seed differ."""

        def given(value: float | None, default: float) -> float:
            return default if value is None else value

        temperature = given(self.temperature, own.temperature if own.do_sample else 0)
        return Sampling(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=own.top_k if self.top_k is None else self.top_k,
            top_p=given(self.top_p, own.top_p),
            min_p=given(self.min_p, own.min_p),
            repetition_penalty=given(self.repetition_penalty, own.repetition_penalty),
            seed=None if self.seed is None else self.seed + choice,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            logprobs=self.top or 0,
        )


class CompletionBody(Body):
    """POST /v1/completions."""

    unserved = UNSERVED_COMPLETION
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: int = Field(COMPLETION_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def top(self) -> int | None:
        return self.logprobs


def _whole(value: str) -> str:
    if not _is_text(value):
        raise ValueError("needed text without half a surrogate pair")
    return value


class TextPart(Part):
    type: Literal["text"]
    text: Annotated[str, AfterValidator(_whole)]


def _parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(Part):
    unserved = UNSERVED_MESSAGE
    role: str
    content: Annotated[list[TextPart], BeforeValidator(_parts)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    unserved = UNSERVED_CHAT
    messages: list[ChatMessage]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _agrees(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("found top_logprobs without logprobs, needed logprobs true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("found max_tokens and max_completion_tokens, needed one of them")
        return self

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
