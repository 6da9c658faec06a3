"""`layersweep serve` over the real scheduler and the bundled model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from served import Served, served, soak  # noqa: E402

from layersweep.cli.app import run  # noqa: E402
from layersweep.generate.request import Request, Sampling  # noqa: E402
from layersweep.generate.scheduler import Scheduler  # noqa: E402
from layersweep.kv.arms import EXACT, Arm, parse  # noqa: E402
from layersweep.serve.app import Offer  # noqa: E402
from layersweep.sweep.model import load  # noqa: E402
from layersweep.text.tokenizer import TextTokenizer  # noqa: E402

TESTS = Path(__file__).parent
INT4 = parse("int4", growing=True)
PROMPTS = {f"def step_{number}(self) -> None:" * (1 + number % 3): number for number in range(4)}


def scheduler() -> Scheduler:
    model = load("demo", device="cpu", vram="512MiB", ram="1GiB")
    tokenizer = TextTokenizer.load(model.checkpoint.folder)
    return Scheduler(model, tokenizer, arms=(EXACT, INT4), most=32, longest=256)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with scheduler() as steps:
        assert steps.tokenizer is not None
        offer = Offer("demo", steps.tokenizer, (EXACT, INT4), steps.room.longest)
        read = lambda: steps.counts.weight_bytes_read  # noqa: E731
        with served(offer, steps, weight_bytes=read) as one:
            yield one


def alone(steps: Scheduler, prompt: str, arm: Arm) -> str:
    assert steps.tokenizer is not None
    ids = tuple(steps.tokenizer.encode(prompt))
    steps.submit(Request("one", ids, Sampling(max_new_tokens=6), arm))
    text = ""
    while not steps.idle:
        text += "".join(output.text for output in steps.step())
    return text


def test_clients_at_once_get_what_each_gets_alone(server: Served) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

    async def ask(prompt: str, number: int) -> str:
        kv = {"kv": "int4"} if number % 2 else {}
        answer = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=6, temperature=0, extra_body=kv
        )
        return str(answer.choices[0].text)

    async def all_at_once() -> list[str]:
        texts = await asyncio.gather(*(ask(*one) for one in PROMPTS.items()))
        await client.close()
        return texts

    texts = asyncio.run(all_at_once())
    with scheduler() as steps:
        expected = [alone(steps, prompt, INT4 if n % 2 else EXACT) for prompt, n in PROMPTS.items()]
    assert texts == expected


def test_what_the_scheduler_refuses_is_400(server: Served) -> None:
    for prompt, words in (([4096], "token id 4096"), ([5] * 256, "found 256 tokens")):
        status, content, _ = server.ask("/v1/completions", {"model": "demo", "prompt": prompt})
        assert (status, words in content["error"]["message"]) == (400, True)


@contextmanager
def started(command: list[str], **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive its test."""
    with subprocess.Popen(command, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_term_signal_lets_the_answer_finish() -> None:
    """The command itself, from its first line to exit code 0."""
    words = ["serve", "demo", "--port", "0", "--max-length", "128", "--device", "cpu"]
    words += ["--vram", "512MiB", "--ram", "1GiB"]
    command = [sys.executable, "-m", "layersweep", *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # cores are shared with other tests
    with started(command, stderr=subprocess.PIPE, text=True, env=alone) as process:
        assert process.stderr is not None
        said = ""
        while "serving demo at " not in said:
            said += process.stderr.readline() or pytest.fail(said)
        url = said.split("serving demo at ")[1].split(",")[0]
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": "demo", "prompt": "The layer", "temperature": 0}
        stream = client.completions.create(**asked, max_tokens=20, stream=True,
                                           extra_body={"ignore_eos": True})  # fmt: skip
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        said += process.stderr.read()
        assert process.wait(30) == 0
    assert (first.choices[0].finish_reason, rest[-1].choices[0].finish_reason) == (None, "length")
    for line in ("[layout]", "[paths]", "[budget]", "[versions]"):
        assert sum(text.startswith(line) for text in said.splitlines()) == 1
    assert "stopping: waits up to 30.0 s for running requests" in said
    assert " length: 2 + 20 tokens in " in said.splitlines()[-1]


HELD = """
import sys
sys.path.insert(0, {tests!r})
from served import ARMS, MODEL, Offer, TextTokenizer, ToySteps
from layersweep.serve.app import Service
from layersweep.serve.server import bind, serve
tokenizer = TextTokenizer.load(MODEL)
steps = ToySteps(tokenizer)
steps.turn.clear()
listener = bind("127.0.0.1", 0)
say = lambda line: print(line, flush=True)
listener.listen()
say(listener.getsockname()[1])
serve(Service(Offer("demo", tokenizer, ARMS, 4096), steps, say), listener, grace=60)
"""


def test_a_second_signal_ends_at_once() -> None:
    command = [sys.executable, "-c", HELD.format(tests=str(TESTS))]
    with started(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        one = Served(None, int(process.stdout.readline()), [])  # type: ignore[arg-type]
        held = one.send({"model": "demo", "prompt": "a"})
        while "layersweep_waiting 1\n" not in one.ask("/metrics")[1]:
            pass
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping: waits up to 60.0 s for running requests\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
        held.close()


BAD = {
    "no such arm": (["--kv", "exact,K9"], "K9"),
    "empty key": (["--api-key", " "], "found an empty key"),
    "grace": (["--grace", "long"], "--grace: found 'long'"),
    "queue": (["--max-waiting", "0"], "--max-waiting: found '0'"),
    "level": (["--log-level", "loud"], "--log-level: found 'loud'"),
    "body": (["--max-body", "big"], "--max-body: found 'big'"),
    "address": (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: found"),
}


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for words, found in BAD.values():
        assert run(["serve", "nowhere", *words]) == 2
        assert found in capsys.readouterr().err


def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve", "demo"]) == 2
    said = capsys.readouterr().err
    assert "error: serve: found no package uvicorn, needed fastapi and uvicorn\n" in said
    assert "hint: pip install layersweep[serve]\n" in said


@pytest.mark.slow
def test_two_thousand_requests_leave_memory_flat(server: Served) -> None:
    process = psutil.Process()
    asyncio.run(soak(server, 200, at_once=16))
    before = process.memory_info().rss
    asyncio.run(soak(server, 2000, at_once=16))
    server.until(lambda: server.service.engine.idle)
    grown = process.memory_info().rss - before
    assert grown < 32 * 2**20, f"{before >> 20} MiB before, {grown / 2**20:.1f} MiB more after"
