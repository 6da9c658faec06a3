"""A connection that may not dawdle: uvicorn's, with the timeouts that it lacks."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from layersweep.serve.guard import Limits


def patient(limits: Limits) -> type[H11Protocol]:
    """A protocol for uvicorn, which cuts connections whose client keeps it waiting.

    uvicorn itself waits for ever for the rest of a head, and for a client that does not read.
    """

    class Patient(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._head, self._unread)
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.unread_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._unread)

        def _await_head(self) -> None:
            """From the end of one request on, the next one's head is awaited, once."""
            if self.cycle is not None and not self.cycle.response_complete:
                _cancel(self._head)
                self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(limits.header_s, self.transport.close)

    return Patient


def _cancel(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
