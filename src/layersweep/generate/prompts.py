"""Prompts from a file and answers to a file: a JSON object per line, written as answers finish.

    {"prompt": "Once upon a time"}                    {"id": "1", "kv": "exact", "text": " there ...
    {"messages": [{"role": "user", "content": ...}]}  {"id": "2", "kv": "exact", "text": ...
    {"ids": [1, 2, 3], "id": "mine", "seed": 7}       {"id": "mine", ...

An answer says what it is an answer to (`asked`), so a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import InputError
from layersweep.generate.request import Output, Request, Sampling, Steps
from layersweep.kv.arms import Arm
from layersweep.text.bos import resolve_bos
from layersweep.text.chat import Message
from layersweep.text.tokenizer import TextTokenizer

GIVEN = ("prompt", "messages", "ids")
TYPES: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,), "do_sample": (bool,), "temperature": (int, float), "top_k": (int,),
    "top_p": (int, float), "min_p": (int, float), "repetition_penalty": (int, float),
    "seed": (int,), "ignore_eos": (bool,), "logprobs": (int,), "stop": (str, list),
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """What is asked once, of every arm. `where` names it in messages; `continues` as in Request."""

    id: str
    where: str
    ids: tuple[int, ...]
    sampling: Sampling
    continues: bool = True

    def requests(self, arms: Sequence[Arm]) -> list[Request]:
        """One for each arm."""
        return [
            Request(f"{self.id} {arm.name}", self.ids, self.sampling, arm, self.continues)
            for arm in arms
        ]


@dataclass
class Answer:
    """What has come of a request."""

    prompt: Prompt
    arm: Arm
    ids: list[int]
    text: str
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str | None = None
    error: str | None = None

    @classmethod
    def to(cls, prompt: Prompt, arm: Arm) -> Answer:
        return cls(prompt, arm, [], "", [], [])

    def add(self, output: Output) -> None:
        self.text += output.text
        self.finish, self.error = output.finish, output.error
        if output.token is not None and output.logprob is not None:
            self.ids.append(output.token)
            self.logprobs.append(output.logprob)
            self.top.append(list(output.top))

    def line(self) -> dict[str, Any]:
        """As it is written."""
        found: dict[str, Any] = {
            "id": self.prompt.id, "kv": self.arm.name, "asked": asked(self.prompt, self.arm),
            "prompt_tokens": len(self.prompt.ids), "text": self.text, "ids": self.ids,
            "finish": self.finish,
        }  # fmt: skip
        if self.error is not None:
            found["error"] = self.error
        if self.prompt.sampling.logprobs:
            found |= {"logprobs": self.logprobs, "top_logprobs": self.top}
        return found


def asked(prompt: Prompt, arm: Arm) -> str:
    """SHA-256, 16 digits, of all that an answer depends on besides the model."""
    of = [list(prompt.ids), asdict(prompt.sampling), arm.name]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]


def one_prompt(
    text: str, tokenizer: TextTokenizer, sampling: Sampling, *, bos: str = "auto",
    chat: bool = False,
) -> Prompt:  # fmt: skip
    """Text from the command line; with `chat`, as a user's message. Raises InputError."""
    given: dict[str, Any] = (
        {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    )
    return _prompt(given, "1", "--prompt", tokenizer, sampling, bos)


def read_prompts(
    path: Path, tokenizer: TextTokenizer, sampling: Sampling, bos: str = "auto"
) -> list[Prompt]:
    """The prompts of a file, each with its own settings over `sampling`; a seed counts on from line
    to line. Raises InputError that names file, line and field."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"--prompts {path}: found no readable file ({error.strerror})") from error
    found: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            given, repeated = parse_json(line)
        except UnusableJson as error:
            raise _wrong(where, str(error), "a JSON object") from error
        if not isinstance(given, dict) or repeated:
            what = f"{repeated[0]} twice" if repeated else "JSON that is no object"
            raise _wrong(where, what, "a JSON object with each field once")
        own = sampling
        if sampling.seed is not None:
            own = replace(sampling, seed=sampling.seed + len(found))
        prompt = _prompt(given, str(number), where, tokenizer, own, bos)
        if prompt.id in found:
            raise _wrong(where, f"id {prompt.id!r} again", "an id for each prompt")
        found[prompt.id] = prompt
    if not found:
        raise InputError(f"--prompts {path}: found no prompts, needed a JSON object per line")
    return list(found.values())


def _prompt(
    given: dict[str, Any], id: str, where: str, tokenizer: TextTokenizer, sampling: Sampling,
    bos: str,
) -> Prompt:  # fmt: skip
    kinds = [name for name in GIVEN if name in given]
    if len(kinds) != 1:
        raise _wrong(where, " and ".join(kinds) or "none", f"one of {', '.join(GIVEN)}")
    settings = {name: value for name, value in given.items() if name not in (*kinds, "id")}
    ids = _ids(kinds[0], given[kinds[0]], where, tokenizer, bos)
    name = given.get("id", id)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise _wrong(where, f"id {name!r}", "text or a number")
    own = _sampling(settings, where, sampling)
    return Prompt(str(name), where, tuple(ids), own, continues=kinds != ["messages"])


def _ids(kind: str, value: Any, where: str, tokenizer: TextTokenizer, bos: str) -> Sequence[int]:
    if kind == "ids":
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise _wrong(where, "ids of something else", "a list of token ids")
        return value
    if kind == "prompt":
        if not isinstance(value, str):
            raise _wrong(where, f"prompt {value!r}"[:80], "text")
        first = resolve_bos(tokenizer, bos)  # type: ignore[arg-type]  # it checks
        return [*([] if first is None else [first]), *tokenizer.encode(value)]
    keys = {"role", "content"}
    if (
        not isinstance(value, list)
        or not value
        or not all(
            isinstance(one, dict)
            and one.keys() == keys
            and all(isinstance(x, str) for x in one.values())
            for one in value
        )
    ):
        raise _wrong(where, "messages of something else", "a list of {role, content} texts")
    return tokenizer.encode_messages([Message(**one) for one in value])


def _sampling(settings: dict[str, Any], where: str, sampling: Sampling) -> Sampling:
    known = {field.name for field in fields(Sampling)}
    for name, value in settings.items():
        if name not in known:
            raise _wrong(
                where, f"the field {name!r}", f"{', '.join(GIVEN)}, id or {', '.join(TYPES)}"
            )
        if type(value) not in TYPES[name]:
            raise _wrong(
                where, f"{name} {value!r}"[:80], " or ".join(t.__name__ for t in TYPES[name])
            )
    if "stop" in settings:
        stop = settings["stop"]
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(one, str) for one in stop):
            raise _wrong(where, f"stop {stop!r}"[:80], "texts")
        settings = {**settings, "stop": tuple(stop)}
    return replace(sampling, **settings)


def _wrong(where: str, found: str, needed: str) -> InputError:
    return InputError(f"{where}: found {found}, needed {needed}")


def answers(
    steps: Steps, prompts: Iterable[Prompt], arms: Sequence[Arm], done: frozenset[str] = frozenset()
) -> Iterator[Answer]:
    """Of each prompt under each arm, as they finish; those that are `done` (see asked) are left
    out. What cannot run is refused before anything does: InputError."""
    waiting: dict[str, Answer] = {}
    for prompt in prompts:
        for request, arm in zip(prompt.requests(arms), arms, strict=True):
            if asked(prompt, arm) in done:
                continue
            try:
                steps.check(request)
            except InputError as error:
                raise InputError(f"{prompt.where}: {error}", hint=error.hint) from error
            waiting[request.id] = Answer.to(prompt, arm)
            steps.submit(request)
    while waiting:
        for output in steps.step():
            answer = waiting[output.request]
            answer.add(output)
            if output.finish is not None:
                yield waiting.pop(output.request)


def kept_answers(path: Path) -> tuple[frozenset[str], int]:
    """What answers of an earlier run are to (see asked), and the length in bytes of the lines that
    are whole: a kill may leave half of one. Raises InputError for a file of something else."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            value = json.loads(line)
            found.add(str(value["asked"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--out {path}, line {number}: found no answer of an earlier run, needed nothing "
                "else in the file",
                hint="another --out",
            ) from error
    return frozenset(found), len(whole)
