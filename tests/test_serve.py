"""`layersweep serve` as its clients see it, over a scheduler without a model."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from builders_tokenizer import load_kind  # noqa: E402
from served import Served, served  # noqa: E402
from toy_steps import BROKEN, NAN, ToySteps  # noqa: E402

from layersweep.generate.request import Request, Sampling  # noqa: E402
from layersweep.kv.arms import EXACT, parse  # noqa: E402
from layersweep.serve import engine  # noqa: E402
from layersweep.serve.app import Offer  # noqa: E402
from layersweep.serve.guard import Limits  # noqa: E402
from layersweep.text.chat import Message  # noqa: E402
from layersweep.text.tokenizer import TextTokenizer  # noqa: E402

MODEL = Path(__file__).parents[1] / "src/layersweep/demo/model"
ARMS = (EXACT, parse("int4", growing=True))
LIMITS = Limits(max_waiting=64, max_body=100_000, header_s=0.3, body_s=0.3, unread_s=0.3)
PROMPT = "The sweep visits"
ASK: dict[str, Any] = {"model": "demo", "prompt": PROMPT}


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


def alone(tokenizer: TextTokenizer, prompt: str | list[int], sampling: Sampling) -> str:
    """What the scheduler says to a prompt when nothing else runs."""
    steps, text = ToySteps(tokenizer), ""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    steps.submit(Request("one", tuple(ids), sampling))
    while not steps.idle:
        text += "".join(output.text for output in steps.step())
    return text


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


# --- limits --------------------------------------------------------------------------------------


def test_a_full_queue_answers_429(server: Served, steps: ToySteps) -> None:
    steps.turn.clear()
    held = server.send({**ASK, "prompt": ["a"] * 60, "max_tokens": 1})
    server.until(lambda: server.service.engine.waiting == 60)
    status, content, headers = server.ask("/v1/completions", {**ASK, "n": 5})
    steps.turn.set()
    assert (status, content["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
    assert held.recv(15) == b"HTTP/1.1 200 OK"
    held.close()


def test_bodies_have_a_limit(server: Served) -> None:
    large = b'{"prompt":"' + b"a" * 5_000_000
    status, content, _ = server.ask("/v1/completions", large)
    assert (status, content["error"]["message"]) == (
        413, "the body: found 5000011 bytes, needed at most 100000 (97.66 KiB)",
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        plain.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        plain.sendall(b"C350\r\n" + b" " * 50_000 + b"\r\n")
        plain.sendall(b"C351\r\n" + b" " * 50_001 + b"\r\n0\r\n\r\n")
        assert plain.recv(12) == b"HTTP/1.1 413"


def test_heads_and_bodies_have_a_time(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        assert plain.recv(1) == b""  # closed
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        assert plain.recv(12) == b"HTTP/1.1 408"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET")
        assert plain.recv(12) == b"HTTP/1.1 200"
        assert plain.makefile("rb").read().endswith(b'{"status":"ok"}')  # and closed


def test_garbage_is_answered(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as plain:
        plain.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert plain.recv(12) == b"HTTP/1.1 400"
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize(("stream", "half"), [(False, False), (True, False), (False, True)])
def test_who_hangs_up_is_cancelled(
    server: Served, steps: ToySteps, stream: bool, half: bool
) -> None:
    """Before the first token. `half`: a connection that can still be read is given up, too."""
    steps.turn.clear()
    told, said = len(steps.cancelled), len(server.lines)
    before = server.service.metrics.requests["/v1/completions", 499]
    plain = server.send({**ASK, "stream": stream, "max_tokens": 4000})
    server.until(lambda: server.service.engine.waiting)
    plain.shutdown(socket.SHUT_WR) if half else plain.close()
    server.until(lambda: len(server.lines) > said)
    steps.turn.set()
    plain.close()
    assert "hung up: 6 + 0 tokens" in server.lines[-1]
    server.until(lambda: len(steps.cancelled) > told)
    assert server.service.metrics.requests["/v1/completions", 499] == before + 1


def test_who_does_not_read_is_cut(
    server: Served, steps: ToySteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOST_UNREAD", 10_000)
    told, said = len(steps.cancelled), len(server.lines)
    plain = server.send({**ASK, "stream": True, "max_tokens": 4000, "logprobs": 20})
    server.until(lambda: len(server.lines) > said and len(steps.cancelled) > told)
    assert "hung up: 6 + " in server.lines[-1]
    plain.close()


def test_what_is_unread_is_bounded(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOST_UNREAD", 50)
    steps = ToySteps(tokenizer)
    with served(Offer("demo", tokenizer, ARMS, 4096), steps) as server:
        plain = server.send({**ASK, "stream": True, "max_tokens": 4000, "logprobs": 20})
        server.until(lambda: steps.cancelled)
        text = b""
        while data := plain.recv(65536):
            text += data
            if b"[DONE]" in text:
                break
        plain.close()
    assert b"the client left 50 outputs unread" in text


def test_a_key_is_asked_for(tokenizer: TextTokenizer) -> None:
    offer = Offer("demo", tokenizer, ARMS, 4096, key="s\u00e9same")
    with served(offer, ToySteps(tokenizer)) as server:
        right = {"authorization": "Bearer s\u00e9same".encode().decode("latin-1")}
        assert server.ask("/v1/completions", ASK, **right)[0] == 200
        for wrong in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic s\u00e9same"}):
            for path, body in (("/v1/completions", ASK), ("/metrics", None)):
                status, content, _ = server.ask(path, body, **wrong)
                assert (status, content["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("/health")[0] == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_metrics_are_what_prometheus_reads(tokenizer: TextTokenizer) -> None:
    with served(Offer("demo", tokenizer, ARMS, 4096), ToySteps(tokenizer)) as server:
        server.ask("/v1/completions", {**ASK, "max_tokens": 7})
        server.ask("/v1/completions", {**ASK, "max_tokens": 0})
        _, text, headers = server.ask("/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    expected = {
        'requests_total{path="/v1/completions",status="200"}': 1,
        'requests_total{path="/v1/completions",status="422"}': 1,
        "running": 0, "waiting": 0, "prompt_tokens_total": 6, "generated_tokens_total": 7,
        "weight_bytes_total": 0, "first_token_seconds_count": 1, "token_seconds_count": 6,
        'token_seconds_bucket{le="+Inf"}': 6,
    }  # fmt: skip
    assert {name: float(lines[f"layersweep_{name}"]) for name in expected} == expected
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) == 9


# --- many clients --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient(tokenizer: TextTokenizer) -> Iterator[Served]:
    """With the limits that users have: clients keep connections for later."""
    with served(Offer("demo", tokenizer, ARMS, 4096), ToySteps(tokenizer)) as one:
        yield one


async def crowd(server: Served, prompts: list[str]) -> dict[str, str]:
    """A client for each prompt at once: every third hangs up in its stream, one sends garbage."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    texts: dict[str, str] = {}

    async def leave(prompt: str) -> None:
        asked = {"model": "demo", "prompt": prompt, "max_tokens": 4000, "temperature": 0}
        async with await client.completions.create(**asked, stream=True) as stream:
            async for _ in stream:
                return

    async def stay(prompt: str, stream: bool) -> None:
        asked = {"model": "demo", "prompt": prompt, "max_tokens": 20, "temperature": 0}
        answer = await client.completions.create(**asked, stream=stream)
        if stream:
            texts[prompt] = "".join([part.choices[0].text async for part in answer])
        else:
            texts[prompt] = answer.choices[0].text

    async def babble() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/9.9\r\n\0\r\n\r\n" * 100)
        await reader.read()
        writer.close()

    clients = [
        leave(prompt) if at % 3 == 0 else stay(prompt, at % 3 == 1)
        for at, prompt in enumerate(prompts)
    ]
    await asyncio.gather(babble(), *clients)
    await client.close()
    return texts


def test_sixty_four_clients_get_what_they_get_alone(
    patient: Served, tokenizer: TextTokenizer
) -> None:
    prompts = [f"client {number}" for number in range(63)]
    texts = asyncio.run(crowd(patient, prompts))
    expected = {
        prompt: alone(tokenizer, prompt, Sampling(max_new_tokens=20))
        for at, prompt in enumerate(prompts)
        if at % 3
    }
    assert len(expected) == 42
    assert texts == expected
    patient.until(lambda: patient.service.engine.idle)


async def soak(server: Served, count: int, at_once: int) -> None:
    """Requests of every kind: whole, streamed, refused, left alone in the middle."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        asked = {"model": server.service.offer.name, "prompt": f"request {number}"}
        async with places:
            match number % 4:
                case 0:
                    await client.completions.create(**asked, max_tokens=8)
                case 1:
                    async for _ in await client.completions.create(
                        **asked, max_tokens=8, stream=True
                    ):
                        pass
                case 2:
                    with pytest.raises(openai.UnprocessableEntityError):
                        await client.completions.create(**asked, max_tokens=0)
                case 3:
                    async with await client.completions.create(
                        **asked, max_tokens=200, stream=True
                    ) as stream:
                        async for _ in stream:
                            break

    await asyncio.gather(*map(one, range(count)))
    await client.close()


def test_a_short_soak_leaves_nothing(patient: Served) -> None:
    before = patient.service.metrics.requests["/v1/completions", 422]
    asyncio.run(soak(patient, 200, at_once=16))
    behind = patient.service.engine
    patient.until(lambda: behind.idle and behind.running + behind.waiting == 0)
    assert patient.service.metrics.requests["/v1/completions", 422] - before == 50


# --- how it ends ---------------------------------------------------------------------------------


def test_a_stop_lets_running_requests_finish(tokenizer: TextTokenizer) -> None:
    steps = ToySteps(tokenizer)
    with served(Offer("demo", tokenizer, ARMS, 4096), steps) as server:
        steps.turn.clear()
        plain = server.send({**ASK, "max_tokens": 5})
        server.until(lambda: server.service.engine.waiting)
        server.ask_to_stop()
        server.until(lambda: any("stopping: waits up to 30.0 s" in line for line in server.lines))
        for path, body in (("/health", None), ("/v1/completions", ASK)):
            status, content, headers = server.ask(path, body)
            assert (status, headers["retry-after"]) == (503, "60")
            assert content["error"]["message"] == "the server is stopping"
        assert server.ask("/metrics")[0] == 200
        steps.turn.set()
        answer = b""
        while data := plain.recv(4096):
            answer += data
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert json.loads(answer.split(b"\r\n\r\n")[1])["usage"]["completion_tokens"] == 5
        plain.close()
    assert server.failure is None


def test_what_outlasts_the_grace_is_cancelled(tokenizer: TextTokenizer) -> None:
    steps = ToySteps(tokenizer)
    with served(Offer("demo", tokenizer, ARMS, 4096), steps, grace=0) as server:
        steps.turn.clear()
        plain = server.send({**ASK, "max_tokens": 4000})
        server.until(lambda: server.service.engine.waiting)
        server.ask_to_stop()
        server.until(lambda: any("stopping: waits up to 0.0 s" in line for line in server.lines))
        steps.turn.set()
        assert plain.recv(12) == b"HTTP/1.1 503"
        plain.close()
    assert server.failure is None


def test_a_failing_engine_ends_the_server(tokenizer: TextTokenizer) -> None:
    steps = ToySteps(tokenizer)
    with served(Offer("demo", tokenizer, ARMS, 4096), steps) as server:
        status, content, _ = server.ask("/v1/completions", {**ASK, "prompt": [BROKEN]})
        assert (status, content["error"]["type"]) == (500, "server_error")
        assert "the engine failed" in content["error"]["message"]
    assert str(server.failure) == "the device fell off the bus"
