"""`layersweep serve` as its clients see it: answers and refusals, over a toy scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from builders_tokenizer import load_kind  # noqa: E402
from served import ARMS, ASK, LIMITS, MODEL, PROMPT, Served, alone, served  # noqa: E402
from toy_steps import NAN, ToySteps  # noqa: E402

from layersweep.generate.request import Sampling  # noqa: E402
from layersweep.serve.app import Offer  # noqa: E402
from layersweep.text.chat import Message  # noqa: E402
from layersweep.text.tokenizer import TextTokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.load(MODEL)


@pytest.fixture(scope="module")
def steps(tokenizer: TextTokenizer) -> ToySteps:
    return ToySteps(tokenizer)


@pytest.fixture(scope="module")
def server(tokenizer: TextTokenizer, steps: ToySteps) -> Iterator[Served]:
    with served(Offer("demo", tokenizer, ARMS, 4096, limits=LIMITS), steps) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


# --- what clients get ----------------------------------------------------------------------------


def test_a_completion_is_what_the_scheduler_says(client: Any, tokenizer: TextTokenizer) -> None:
    expected = alone(tokenizer, PROMPT, Sampling(max_new_tokens=12))
    answer = client.completions.create(**ASK, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected, "length", 0)
    prompt_tokens = len(tokenizer.encode(PROMPT))
    assert (answer.object, answer.model) == ("text_completion", "demo")
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
        "prompt_tokens": prompt_tokens, "completion_tokens": 12,
    }  # fmt: skip
    ids = tokenizer.encode(PROMPT)
    many = client.completions.create(model="demo", prompt=[ids, ids], max_tokens=12, temperature=0)
    assert [one.text for one in many.choices] == [expected, expected]
    assert many.usage.prompt_tokens == 2 * prompt_tokens


def test_choices_of_a_seed_differ_and_come_again(client: Any) -> None:
    asked = {"model": "demo", "prompt": ["one", "two"], "n": 2, "max_tokens": 5}
    first = client.completions.create(**asked, seed=3)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert first.usage.completion_tokens == 20
    again = client.completions.create(**asked, seed=3)
    assert [choice.text for choice in again.choices] == texts
    other = client.completions.create(**asked, seed=4)
    assert other.choices[0].text == texts[1]  # seed 4 is the second choice of seed 3


def test_a_stream_adds_up(client: Any) -> None:
    asked = {**ASK, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    *before, last = [part.choices[0].finish_reason for part in parts]
    assert (set(before) <= {None}, last) == (True, "length")
    options = {"include_usage": True}
    parts = list(client.completions.create(**asked, stream=True, stream_options=options))
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage


def test_a_stream_is_events_up_to_done(server: Served) -> None:
    _, text, headers = server.ask("/v1/completions", {**ASK, "max_tokens": 3, "stream": True})
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["id"] for event in events[:-2])


def test_stop_strings_end_the_text(client: Any, tokenizer: TextTokenizer) -> None:
    full = alone(tokenizer, PROMPT, Sampling(max_new_tokens=12))
    asked = {**ASK, "max_tokens": 12, "temperature": 0, "stop": full[20:24]}
    answer = client.completions.create(**asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (full[:20], "stop")
    parts = list(client.completions.create(**{**asked, "stop": ["\0", full[20:24]]}, stream=True))
    assert "".join(part.choices[0].text for part in parts) == full[:20]


def test_logprobs_of_completions(client: Any, tokenizer: TextTokenizer) -> None:
    answer = client.completions.create(**ASK, max_tokens=4, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.token_logprobs == [-1.0] * 4
    assert [list(top.values()) for top in found.top_logprobs] == [[-1.0, -2.0]] * 4
    assert found.text_offset == [0, *(len("".join(found.tokens[:at])) for at in (1, 2, 3))]
    parts = client.completions.create(**ASK, max_tokens=4, temperature=0, logprobs=0, stream=True)
    assert [top for part in parts for top in part.choices[0].logprobs.top_logprobs] == [{}] * 4


def test_models_health_and_unknown_places(client: Any, server: Served) -> None:
    (model,) = client.models.list()
    assert (model.id, model.max_model_len, model.kv) == ("demo", 4096, ["exact", "int4"])
    assert client.models.retrieve("demo").id == "demo"
    assert server.ask("/health")[:2] == (200, {"status": "ok"})
    for path, status in (("/v1/models/gpt", 404), ("/docs", 404), ("/v1/completions", 405)):
        found, content, _ = server.ask(path)
        assert (found, content["error"]["type"]) == (status, "invalid_request_error")


def test_an_arm_by_request(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ToySteps, "check", lambda self, request: asked.append(request.arm.name))
    for extra in ({}, {"kv": "INT4"}, {"kv": "exact"}):
        assert server.ask("/v1/completions", {**ASK, **extra})[0] == 200
    assert asked == ["exact", "int4", "exact"]


# --- chats ---------------------------------------------------------------------------------------

CHAT: dict[str, Any] = {"model": "marked", "max_tokens": 6, "temperature": 0}
PARTS = [{"type": "text", "text": "Say </s>"}, {"type": "text", "text": "!"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Say </s>"}, {"type": "text", "text": "!"}],
    },
]


@pytest.fixture(scope="module")
def chats() -> Iterator[Served]:
    """A model with a chat template."""
    marked = load_kind("marked")
    with served(Offer("marked", marked, ARMS, 4096, limits=LIMITS), ToySteps(marked)) as one:
        yield one


def test_a_chat_goes_through_the_template(chats: Served) -> None:
    marked = load_kind("marked")
    ids = marked.encode_messages([Message("system", "Be brief."), Message("user", "Say </s>!")])
    assert ids.count(marked.tokenizer.token_to_id("</s>")) == 2  # the template's own
    expected = alone(marked, ids, Sampling(max_new_tokens=6))
    client = openai.OpenAI(base_url=f"{chats.url}/v1", api_key="any", max_retries=0)
    answer = client.chat.completions.create(**CHAT, messages=TALK, logprobs=True, top_logprobs=1)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected)
    assert (answer.object, choice.finish_reason) == ("chat.completion", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 6)
    shown = choice.logprobs.content
    assert "".join(token.token for token in shown) == expected
    assert bytes(byte for token in shown for byte in token.bytes) == expected.encode()
    assert [len(token.top_logprobs) for token in shown] == [1] * 6

    parts = list(client.chat.completions.create(**CHAT, messages=TALK, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "length"


def test_a_chat_without_a_limit_ends_with_the_model(
    chats: Served, tokenizer: TextTokenizer
) -> None:
    body = {"model": "marked", "messages": TALK, "max_completion_tokens": 2}
    status, content, _ = chats.ask("/v1/chat/completions", body)
    assert (status, content["usage"]["completion_tokens"]) == (200, 2)
    short = replace(chats.service.offer, longest=60)
    with served(short, ToySteps(short.tokenizer)) as server:
        del body["max_completion_tokens"]
        _, content, _ = server.ask("/v1/chat/completions", body)
    assert content["usage"]["total_tokens"] == 60


REFUSED_CHATS: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": []}, 400, "messages: found none, needed one or more"),
    ({"messages": [{"role": "oracle", "content": "a"}]}, 400, "messages.0.role: found 'oracle'"),
    ({"messages": [{"role": "user"}]}, 422, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, 400, "tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "'text'"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 422, "messages.0.content.0.text"),
    ({"tools": [{"type": "function"}]}, 400, "tools: found [{'type': 'function'}]"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"top_logprobs": 3}, 422, "needed logprobs true"),
    ({"max_completion_tokens": 5}, 422, "needed one of them"),
    ({"prompt": "a"}, 422, "prompt: unknown parameter"),
]


def test_what_a_chat_cannot_be_is_refused(chats: Served, server: Served) -> None:
    for extra, status, words in REFUSED_CHATS:
        body = {**CHAT, "messages": TALK, **extra}
        found, content, _ = chats.ask("/v1/chat/completions", body)
        assert (found, words in content["error"]["message"]) == (status, True), content
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    assert chats.ask("/v1/chat/completions", {**CHAT, "messages": TALK, **neutral})[0] == 200
    body = {**CHAT, "messages": TALK, "model": "demo"}
    status, content, _ = server.ask("/v1/chat/completions", body)
    assert (status, "found no chat template" in content["error"]["message"]) == (400, True)


# --- what is refused -----------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], int, str | None]] = [
    ({"foo": 1}, 422, "foo"),
    ({"max_new_tokens": 5}, 422, "max_new_tokens"),
    ({"max_tokens": 0}, 422, "max_tokens"),
    ({"max_tokens": "5"}, 422, "max_tokens"),
    ({"temperature": -1}, 422, "temperature"),
    ({"top_p": 0}, 422, "top_p"),
    ({"n": 0}, 422, "n"),
    ({"stop": ""}, 422, "stop.0"),
    ({"stop": ["a"] * 17}, 422, "stop"),
    ({"seed": -1}, 422, "seed"),
    ({"logprobs": 21}, 422, "logprobs"),
    ({"prompt": []}, 422, "prompt"),
    ({"prompt": [[]]}, 422, "prompt"),
    ({"prompt": [1, "a"]}, 422, "prompt"),
    ({"prompt": [True]}, 422, "prompt"),
    ({"prompt": "\ud800"}, 422, "prompt"),
    ({"\ud800": 1}, 422, None),
    ({"stream_options": {"usage": True}}, 422, "stream_options.usage"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"echo": True}, 400, "echo"),
    ({"best_of": 2}, 400, "best_of"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"kv": "K3V2"}, 400, "kv"),
    ({"model": "gpt"}, 404, "model"),
    ({"prompt": ""}, 400, None),
    ({"prompt": [4096]}, 400, None),
    ({"prompt": [5] * 4096}, 400, None),
    ({"prompt": ["a"] * 65}, 400, None),
]


def test_what_cannot_be_answered_is_refused_by_name(server: Served) -> None:
    for body, status, param in REFUSED:
        found, content, _ = server.ask("/v1/completions", {**ASK, **body})
        assert (found, content["error"]["param"]) == (status, param), body
        assert content["error"]["type"] == "invalid_request_error"
    for garbage, status in ((b"{", 400), (b"[1]", 422), (b"\xff", 400), (b"[" * 50_000, 400)):
        assert server.ask("/v1/completions", garbage)[0] == status, garbage[:3]
    for body, words in (({}, "model: found nothing"), ([], "content-type: application/json")):
        assert words in server.ask("/v1/completions", body)[1]["error"]["message"]


def test_what_asks_for_nothing_is_taken(server: Served) -> None:
    neutral = {
        "logit_bias": {}, "echo": False, "best_of": 1, "suffix": None, "presence_penalty": 0,
        "frequency_penalty": 0.0, "user": "me", "stop": None, "seed": None, "temperature": None,
    }  # fmt: skip
    assert server.ask("/v1/completions", {**ASK, **neutral})[0] == 200


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="foo: unknown parameter"):
        client.completions.create(**ASK, extra_body={"foo": 1})
    with pytest.raises(openai.NotFoundError, match="needed 'demo', which is served here"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="hint: write a prompt"):
        client.completions.create(model="demo", prompt="")


def test_nan_is_the_error_of_its_request_alone(
    server: Served, client: Any, tokenizer: TextTokenizer
) -> None:
    said = len(server.lines)
    with pytest.raises(openai.InternalServerError, match="found NaN in layer 0"):
        client.with_options(max_retries=2).completions.create(model="demo", prompt=[NAN])
    assert len(server.lines) == said + 1  # asked once: the client is told not to try again
    with pytest.raises(openai.APIError, match="found NaN in layer 0"):
        list(client.completions.create(model="demo", prompt=[NAN], stream=True))
    answer = client.completions.create(**ASK, max_tokens=3, temperature=0)
    assert answer.choices[0].text == alone(tokenizer, PROMPT, Sampling(max_new_tokens=3))


def test_an_error_ends_all_sequences_of_its_request(server: Served, steps: ToySteps) -> None:
    body = {**ASK, "prompt": [[NAN], [5]], "max_tokens": 4000}
    assert server.ask("/v1/completions", body)[0] == 500
    server.until(lambda: steps.cancelled)
    assert [name.split(".", 1)[1] for name in steps.cancelled] == ["1.0"]
