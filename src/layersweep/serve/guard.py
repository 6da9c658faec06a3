"""What is checked before a request reaches the app: the key, the size and pace of its body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layersweep.serve.engine import LONGEST_RETRY_S, STOPPING
from layersweep.serve.metrics import Metrics
from layersweep.serve.refusal import HungUp, Refusal
from layersweep.units import format_bytes

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
OPEN = "/health"  # asked by load balancers, which have no key
WATCHED = "/metrics"  # to the end
HUNG_UP = 499  # as nginx counts it; never sent


@dataclass(frozen=True)
class Limits:
    """What one client may take. Times in seconds.

    `header_s`: until a request's head is there, on a new connection and on one that is kept.
    `body_s`: until its body is. `unread_s`: while a full connection takes nothing. `connections`:
    at once, the next one gets 503.
    """

    max_waiting: int = 128
    max_body: int = 4 * 2**20
    header_s: float = 30.0
    body_s: float = 60.0
    unread_s: float = 30.0
    connections: int = 1024


class Guard:
    """ASGI around the app. It hands the body over whole, and counts requests by path and status."""

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, *, key: str | None,
        stopping: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.app, self.limits, self.metrics = app, limits, metrics
        self._key = None if key is None else key.encode()
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, ended = HUNG_UP, False

        async def counted_send(message: Message) -> None:
            nonlocal status, ended
            status = message.get("status", status)
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        async def counted_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                status = HUNG_UP
            return message

        try:
            body = await self._admitted(scope, receive)
            await self.app(scope, _replay(body, counted_receive), counted_send)
        except Refusal as refusal:
            await _refuse(refusal, receive, counted_send)
        except HungUp:
            pass
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests[path, status] += 1

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request that may come in."""
        headers = Headers(scope=scope)
        if self._key is not None and scope["path"] != OPEN:
            self._check_key(headers.get("authorization", ""))
        if self._stopping() and scope["path"] != WATCHED:
            raise Refusal(503, STOPPING, retry_after=LONGEST_RETRY_S)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.limits.max_body:
            raise self._too_large(f"{int(declared)}")
        try:
            async with asyncio.timeout(self.limits.body_s):
                return await self._read(receive)
        except TimeoutError:
            raise Refusal(
                408, f"the body: needed within {self.limits.body_s:g} s, found it unfinished"
            ) from None

    def _check_key(self, authorization: str) -> None:
        """In a time that says nothing of how much is right."""
        kind, _, given = authorization.partition(" ")
        assert self._key is not None
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if not same or kind.lower() != "bearer":
            raise Refusal(
                401, "found no valid API key, needed the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )  # fmt: skip

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HungUp
            body += message["body"]
            more = message["more_body"]
            if len(body) > self.limits.max_body:
                raise self._too_large("more")
        return bytes(body)

    def _too_large(self, found: str) -> Refusal:
        most = self.limits.max_body
        return Refusal(
            413, f"the body: found {found} bytes, needed at most {most} ({format_bytes(most)})"
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


DRAIN_S = 2.0


async def _refuse(refusal: Refusal, receive: Receive, send: Send) -> None:
    """Answer, then read on for a while: a client that still writes would see a reset connection
    and no answer."""
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(refusal.body)).encode()),
        *((name.encode(), value.encode()) for name, value in refusal.headers.items()),
    ]
    start: dict[str, Any] = {"type": "http.response.start", "status": refusal.status}
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body, "more_body": True})
    try:
        async with asyncio.timeout(DRAIN_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})
