"""`layersweep serve` under bad clients, many clients, and when it stops, over a toy scheduler."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from served import ARMS, ASK, HASTY, LIMITS, MODEL, Served, alone, served, soak  # noqa: E402
from toy_steps import BROKEN, ToySteps  # noqa: E402

from layersweep.generate.request import Sampling  # noqa: E402
from layersweep.serve import engine  # noqa: E402
from layersweep.serve.app import Offer  # noqa: E402
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


@pytest.fixture(scope="module")
def hasty(tokenizer: TextTokenizer) -> Iterator[Served]:
    """A server that does not wait for anybody."""
    with served(Offer("demo", tokenizer, ARMS, 4096, limits=HASTY), ToySteps(tokenizer)) as one:
        yield one


def test_heads_and_bodies_have_a_time(hasty: Served) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        assert plain.recv(1) == b""  # closed
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        assert plain.recv(12) == b"HTTP/1.1 408"
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as plain:
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


def test_who_does_not_read_is_cut(hasty: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MOST_UNREAD", 10_000)
    plain = hasty.send({**ASK, "stream": True, "max_tokens": 4000, "logprobs": 20})
    hasty.until(lambda: any(" hung up: 6 + " in line for line in hasty.lines))
    hasty.until(lambda: hasty.service.engine.running == 0)
    assert hasty.service.metrics.generated_tokens < 4000
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
