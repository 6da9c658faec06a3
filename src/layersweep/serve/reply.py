"""The answer to one HTTP request, from its ticket to its last byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from layersweep.generate.request import Finish, Output
from layersweep.serve.answer import Choice, Speller, Usage, one_line
from layersweep.serve.engine import STOPPING, Engine, Ticket
from layersweep.serve.refusal import HungUp, Refusal
from layersweep.units import format_seconds

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; raises HungUp, with the work cancelled, where the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Reply(Response):
    """Sends what comes of a ticket, whole or as server-sent events, and cancels what nobody reads.

    A refusal before the first byte is raised, and becomes the status; later it is an event of the
    stream. `n`: sequences of one prompt. `say` is told one line at the end.
    """

    def __init__(
        self, engine: Engine, ticket: Ticket, speller: Speller, *, n: int, stream: bool,
        usage: bool, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.engine, self.ticket, self.speller, self.n = engine, ticket, speller, n
        self.stream, self.shows_usage, self.say = stream, usage, say
        self.choices = [Choice(index) for index in range(len(ticket.requests))]
        self.generated, self._began = 0, False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end = "failed"
        try:
            await unless_hung_up(receive, self._stream(send) if self.stream else self._whole(send))
            end = ",".join(sorted({choice.finish for choice in self.choices if choice.finish}))
        except HungUp:
            end = "hung up"
        except Refusal as refusal:
            end = f"{refusal.status} {refusal}"
            self.engine.cancel(self.ticket)  # now: the client may take its time to read of it
            if not self._began:
                raise
            with suppress(HungUp):
                await unless_hung_up(receive, self._failed(send, refusal))
        finally:
            self.engine.cancel(self.ticket)
            self.say(self._line(end))

    def _line(self, end: str) -> str:
        took = time.monotonic() - self.ticket.began
        first = self.ticket.first_s
        speed = f"{self.generated / took:.1f} tokens/s" if took else "at once"
        began = "no token" if first is None else f"first after {format_seconds(first)}"
        usage = self._usage()
        return (
            f"{self.speller.id} {end}: {usage.prompt} + {usage.completion} tokens in "
            f"{format_seconds(took)}, {began}, {speed}"
        )

    def _usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        prompts = self.ticket.requests[:: self.n]
        return Usage(sum(len(request.ids) for request in prompts), self.generated)

    async def _whole(self, send: Send) -> None:
        await self.ticket.accepted()
        while not self._ended:
            self._add_all(await self.ticket.read())
        body = one_line(self.speller.whole(self.choices, self._usage())).encode()
        headers = [(b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        await self.ticket.accepted()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"cache-control", b"no-cache"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._began = True
        for choice in self.choices:
            await self._event(send, self.speller.opening(choice.index))
        while not self._ended:
            for part in self._add_all(await self.ticket.read()):
                await self._event(send, self.speller.part(part))
            await asyncio.sleep(0)  # sends to a closed connection wait for nothing
        if self.shows_usage:
            await self._event(send, self.speller.usage(self._usage()))
        await send({"type": "http.response.body", "body": DONE})

    async def _failed(self, send: Send, refusal: Refusal) -> None:
        await self._event(send, refusal.content)
        await send({"type": "http.response.body", "body": DONE})

    async def _event(self, send: Send, content: dict[str, Any] | None) -> None:
        """A `data:` line; send waits while the connection is full."""
        if content is not None:
            body = f"data: {one_line(content)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

    @property
    def _ended(self) -> bool:
        return all(choice.finish for choice in self.choices)

    def _add_all(self, outputs: Sequence[tuple[int, Output]]) -> list[Choice]:
        """Keep outputs; returns what they add, once for each sequence, without what adds nothing.

        A client that is slow gets several tokens at once.
        """
        parts: dict[int, Choice] = {}
        for index, output in outputs:
            choice = self.choices[index]
            part = parts.setdefault(index, Choice(index))
            tokens = self.speller.words.token(output, len(choice.text))
            self.generated += output.token is not None
            for one in (choice, part):
                one.text += output.text
                one.tokens += tokens
                one.finish = _finish(output)
        return [part for part in parts.values() if part.text or part.tokens or part.finish]


def _finish(output: Output) -> Finish | None:
    """Raises Refusal for an end without an answer."""
    if output.finish == "error":
        raise Refusal(500, output.error or "the sequence failed")
    if output.finish == "cancelled":
        raise Refusal(503, STOPPING)
    return output.finish
