"""The server's life: listen, answer, stop when asked to."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from layersweep.errors import InputError
from layersweep.serve.app import Service
from layersweep.serve.connection import patient
from layersweep.units import format_seconds

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FLUSH_S = 5  # for answers that are finished and not sent yet
LATEST_CHECK_S = 0.05


class _Web(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: they end what the engine does first."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that can listen. Raises InputError for an address that cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--host {host} --port {port}: found {error}, needed a free address of this machine",
            hint="--port 0 takes a free one",
        ) from error
    return listener


def serve(service: Service, listener: socket.socket, *, grace: float) -> None:
    """Answer until SIGTERM or SIGINT; then finish what runs, for `grace` seconds at most. A second
    signal ends the process at once."""

    async def until_signal() -> None:
        stop = asyncio.Event()

        def stopped() -> None:
            stop.set()
            for one in SIGNALS:  # a step cannot be interrupted, a process can
                signal.signal(one, signal.SIG_DFL)

        for one in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(one, stopped)
        await run(service, listener, stop, grace=grace)

    asyncio.run(until_signal())


async def run(
    service: Service, listener: socket.socket, stop: asyncio.Event, *, grace: float
) -> None:
    """As `serve`, until `stop` is set. Raises what ended the engine before."""
    web = _Web(_config(service))
    answering = asyncio.ensure_future(web.serve([listener]))
    computing = asyncio.ensure_future(service.engine.run())
    asked = asyncio.ensure_future(stop.wait())
    await asyncio.wait((answering, computing, asked), return_when=asyncio.FIRST_COMPLETED)
    service.stopping = True
    if stop.is_set():
        service.say(f"stopping: waits up to {format_seconds(grace)} for running requests")
    asked.cancel()
    ends = time.monotonic() + grace
    while not service.engine.idle and not computing.done() and time.monotonic() < ends:
        await asyncio.sleep(LATEST_CHECK_S)
    service.engine.stop()
    await asyncio.wait((computing,))
    web.should_exit = True
    await answering
    computing.result()


def _config(service: Service) -> uvicorn.Config:
    limits = service.offer.limits
    return uvicorn.Config(
        service.app(),
        http=patient(limits),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="error",  # a stranger's broken request is no news
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=int(limits.header_s) + 1,  # the protocol's own ends first
        timeout_graceful_shutdown=FLUSH_S,
    )
