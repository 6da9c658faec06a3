"""The thread that drives the scheduler, and what the event loop sees of it.

    event loop    submit, cancel --> orders --> one step after the other    the engine's thread
                  tickets <-- call_soon_threadsafe <-- the step's outputs

Orders are done between steps. The lock guards the list of orders and is never held while anything
computes, so the event loop does not wait. Tickets belong to the event loop alone.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from layersweep.errors import InputError
from layersweep.generate.request import Output, Request, Steps
from layersweep.serve.metrics import Metrics
from layersweep.serve.refusal import Refusal, refusal_of

# Outputs that one HTTP request may leave unread. A client that reads is a few behind.
MOST_UNREAD = 1024
LONGEST_RETRY_S = 60
STOPPING = "the server is stopping"


class Ticket:
    """The sequences of one HTTP request, and what has come of them and is not read yet."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.began = time.monotonic()
        self.first_s: float | None = None  # from there to the first token
        self._accepted = False
        self._unread: list[tuple[int, Output]] = []
        self._failure: Refusal | None = None
        self._news = asyncio.Event()

    async def accepted(self) -> None:
        """Returns once the scheduler has taken all sequences; raises Refusal if it does not."""
        while not self._accepted:
            await self._next()

    async def read(self) -> list[tuple[int, Output]]:
        """(index of the sequence, output) of all that has come since the last call, at least one.

        Raises Refusal where nothing more will come.
        """
        while not self._unread:
            await self._next()
        unread, self._unread = self._unread, []
        return unread

    async def _next(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._news.clear()
        await self._news.wait()

    def accept(self) -> None:
        self._accepted = True
        self._news.set()

    def put(self, index: int, output: Output) -> bool:
        """False where too much is unread: then this output is dropped."""
        if len(self._unread) >= MOST_UNREAD:
            return False
        self._unread.append((index, output))
        self._news.set()
        return True

    def fail(self, refusal: Refusal) -> None:
        self._failure = refusal
        self._unread = []
        self._news.set()


@dataclass
class _Sequence:
    """One that the engine still owes outputs. `last`: when its last token came."""

    ticket: Ticket
    index: int
    last: float | None = None


class Engine:
    """Drives `steps`. All methods are the event loop's, except those of the thread below."""

    def __init__(self, steps: Steps, metrics: Metrics, *, max_waiting: int) -> None:
        self.metrics, self.max_waiting = metrics, max_waiting
        self._steps = steps
        self._open: dict[str, _Sequence] = {}
        self._lock = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()
        self._ordered = 0  # sequences among the orders
        self._held = 0  # sequences that wait in the scheduler
        self._running = 0
        self._stopping = False
        self._first_s = 0.0  # of the last request that got a token

    async def run(self) -> None:
        """Drive the scheduler until `stop`; raises what a step raised. Open tickets fail then."""
        self._loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "engine") as thread:
            try:
                await self._loop.run_in_executor(thread, self._drive)
            finally:
                stopped = self._stopping
                self.stop()
                message = STOPPING if stopped else "the engine failed; see the server's log"
                self._fail_all(Refusal(503 if stopped else 500, message))

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        with self._lock:
            return self._ordered + self._held

    @property
    def idle(self) -> bool:
        """No HTTP request waits for anything."""
        return not self._open

    def check_room(self, count: int) -> None:
        """Raises Refusal where there is no room for so many more sequences."""
        if self._stopping:
            raise Refusal(503, STOPPING, retry_after=LONGEST_RETRY_S)
        if count > self.max_waiting:
            raise Refusal(
                400, f"found {count} sequences (prompts x n), needed at most {self.max_waiting}"
            )
        waiting = self.waiting
        if waiting + count > self.max_waiting:
            raise Refusal(
                429, f"the queue is full: {waiting} sequences wait", code="queue_full",
                retry_after=min(LONGEST_RETRY_S, max(1, math.ceil(self._first_s))),
            )  # fmt: skip

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue the sequences of one HTTP request, if `check_room` lets them in."""
        self.check_room(len(requests))
        ticket = Ticket(requests)
        for index, request in enumerate(requests):
            self._open[request.id] = _Sequence(ticket, index)
        self._order(partial(self._admit, ticket), sequences=len(requests))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody reads the ticket any more. Nothing happens to one that has ended."""
        for request in ticket.requests:
            if self._open.pop(request.id, None) is not None:
                self._order(partial(self._steps.cancel, request.id))

    def stop(self) -> None:
        """Cancel all that is open; `run` ends after the step that is under way."""
        self._stopping = True
        for name in self._open:
            self._order(partial(self._steps.cancel, name))
        self._order(lambda: None)  # an idle thread wakes up

    def _order(self, order: Callable[[], None], sequences: int = 0) -> None:
        with self._lock:
            self._orders.append(order)
            self._ordered += sequences
            self._lock.notify()

    def _fail_all(self, refusal: Refusal) -> None:
        for sequence in self._open.values():
            sequence.ticket.fail(refusal)
        self._open.clear()

    # --- told by the thread, on the event loop ---------------------------------------------------

    def _accepted(self, ticket: Ticket) -> None:
        self.metrics.prompt_tokens += sum(len(request.ids) for request in ticket.requests)
        ticket.accept()

    def _refused(self, ticket: Ticket, error: InputError) -> None:
        for request in ticket.requests:
            self._open.pop(request.id, None)
        ticket.fail(refusal_of(error))

    def _deliver(self, outputs: Sequence[Output], now: float) -> None:
        for output in outputs:
            sequence = self._open.get(output.request)
            if sequence is None:  # cancelled since
                continue
            if output.token is not None:
                self._count(sequence, now)
            if output.finish is not None:
                del self._open[output.request]
            ticket = sequence.ticket
            if not ticket.put(sequence.index, output):
                ticket.fail(Refusal(500, f"the client left {MOST_UNREAD} outputs unread"))
                self.cancel(ticket)

    def _count(self, sequence: _Sequence, now: float) -> None:
        self.metrics.generated_tokens += 1
        if sequence.last is not None:
            self.metrics.between.observe(now - sequence.last)
        elif sequence.ticket.first_s is None:
            self._first_s = sequence.ticket.first_s = now - sequence.ticket.began
            self.metrics.first.observe(self._first_s)
        sequence.last = now

    # --- the engine's thread ---------------------------------------------------------------------

    def _drive(self) -> None:
        while True:
            for order in self._take():
                order()
            if not self._steps.idle:
                outputs = self._steps.step()
                self._running = self._steps.running
                with self._lock:
                    self._held = self._steps.waiting
                self._tell(partial(self._deliver, outputs, time.monotonic()))
            elif self._stopping:
                return

    def _take(self) -> list[Callable[[], None]]:
        """The orders since the last step; waits for one where the scheduler has nothing to do."""
        with self._lock:
            if self._steps.idle and not self._stopping:
                self._lock.wait_for(lambda: self._orders)
            orders = list(self._orders)
            self._orders.clear()
            return orders

    def _admit(self, ticket: Ticket) -> None:
        """All sequences of an HTTP request, or none."""
        try:
            for request in ticket.requests:
                self._steps.check(request)
        except InputError as error:
            self._tell(partial(self._refused, ticket, error))
        else:
            for request in ticket.requests:
                self._steps.submit(request)
            self._tell(partial(self._accepted, ticket))
        with self._lock:
            self._ordered -= len(ticket.requests)
            self._held = self._steps.waiting

    def _tell(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)
