"""A server in a thread of this process, on a free port, plain HTTP to it, and what it answers."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from toy_steps import ToySteps

from layersweep.generate.request import Request, Sampling, Steps
from layersweep.kv.arms import EXACT, parse
from layersweep.serve.app import Offer, Service
from layersweep.serve.guard import Limits
from layersweep.serve.server import bind, run
from layersweep.text.tokenizer import TextTokenizer

MODEL = Path(__file__).parents[1] / "src/layersweep/demo/model"
ARMS = (EXACT, parse("int4", growing=True))
LIMITS = Limits(max_waiting=64, max_body=100_000)
HASTY = Limits(header_s=0.3, body_s=0.3, unread_s=0.3)
PROMPT = "The sweep visits"
ASK: dict[str, Any] = {"model": "demo", "prompt": PROMPT}


@dataclass
class Served:
    """`lines`: what it said; `failure`: what ended it."""

    service: Service
    port: int
    lines: list[str]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    failure: RuntimeError | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask_to_stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)

    def ask(
        self, path: str, body: object = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """(status, JSON or text, headers). `body`: what becomes JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {"content-type": "application/json"} if data else {}
        connection.request("POST" if data else "GET", path, data, {**kind, **headers})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers["content-type"] == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers

    def send(self, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
        """A connection on which a request was sent, and nothing is read yet."""
        data = json.dumps(body).encode()
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(30)
        plain.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        plain.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return plain

    def until(self, holds: Callable[[], object]) -> None:
        """Waits for it, for 20 s at most, and keeps the server answering meanwhile."""
        ends = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < ends, self.lines
            assert self.ask("/metrics")[0] == 200


@contextmanager
def served(
    offer: Offer, steps: Steps, *, grace: float = 30,
    weight_bytes: Callable[[], int] = lambda: 0,
) -> Iterator[Served]:  # fmt: skip
    lines: list[str] = []
    listener = bind("127.0.0.1", 0)
    # so that a client which does not read is noticed after a few KB; connections inherit it
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    one = Served(
        Service(offer, steps, lines.append, weight_bytes), listener.getsockname()[1], lines
    )
    listener.listen()  # who connects from now on is served

    def live() -> None:
        try:
            one.loop.run_until_complete(run(one.service, listener, one.stop, grace=grace))
        except RuntimeError as failure:
            one.failure = failure
        finally:
            one.loop.close()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield one
    finally:
        if thread.is_alive():
            one.ask_to_stop()
        thread.join()


def alone(tokenizer: TextTokenizer, prompt: str | list[int], sampling: Sampling) -> str:
    """What the scheduler says to a prompt when nothing else runs."""
    steps, text = ToySteps(tokenizer), ""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    steps.submit(Request("one", tuple(ids), sampling))
    while not steps.idle:
        text += "".join(output.text for output in steps.step())
    return text


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
