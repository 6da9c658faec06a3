"""Who runs: requests wait, are read, get a token with every walk over the weights, and finish.

    step():   cancelled ones leave -> memory for everybody's next token, or the newest are set back
              -> waiting ones enter, as many as there is memory for -> one walk -> a token each

What a request has when it is set back waits in host memory, so its tokens are the same. Where there
is no room for that either, its text is read anew, which changes nothing for the exact cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from layersweep.errors import Fallback, InputError
from layersweep.generate.config import GenerationConfig
from layersweep.generate.counts import Counts, Rider
from layersweep.generate.request import Finish, Output, Request
from layersweep.generate.room import MOST, SPARE, check_arm, make_room
from layersweep.generate.run import Run
from layersweep.generate.sampling import Sampler, check_sampling
from layersweep.generate.walk import Passage, walk
from layersweep.kv.arms import Arm
from layersweep.sweep.model import Model
from layersweep.sweep.record import Progress, SweepRecord
from layersweep.sweep.running import RunningCaches, Text, capacity_for, row_bytes
from layersweep.sweep.shapes import can_fit
from layersweep.sweep.turn import HostTurn
from layersweep.text.bos import resolve_bos
from layersweep.text.reference import with_reference
from layersweep.text.streaming import TextStream
from layersweep.text.tokenizer import TextTokenizer
from layersweep.units import format_bytes

LESS = 0.8  # of what was in use when memory ended


class Scheduler:
    """See the module's text; generate/request.py has the contract (Steps).

    It holds the model's weights and the memory of its plan until it is closed. `tokenizer`: None
    for requests that want ids alone. `arms`: those that requests will have; only among these can
    be some that take coordinates from the reference text. `most`: requests that run at once;
    `longest`: tokens of the longest text, the model's limit by default.
    """

    def __init__(
        self, model: Model, tokenizer: TextTokenizer | None = None, *, arms: Sequence[Arm] = (),
        most: int = MOST, longest: int | None = None,
        say: Callable[[Fallback], None] = lambda fallback: None,
        progress: Progress = lambda phase, done, total: None,
    ) -> None:  # fmt: skip
        if tokenizer is not None:
            model = with_reference(model, arms, tokenizer, resolve_bos(tokenizer, "auto"))
        self.model, self.tokenizer = model, tokenizer
        self.config = GenerationConfig.read(model.checkpoint.folder)
        self.room = make_room(model, most=most, longest=longest)
        self.counts = Counts()
        self.rode: tuple[Rider, ...] = ()  # in the last walk
        self._token_bytes = row_bytes(model.decoder, 1, model.machine.element)
        self._known: set[Arm] = set()
        self._say, self._progress = say, progress
        self._turn = HostTurn()
        self._engine = self.room.open(model, say)
        self._caches = RunningCaches(model.compute.device)
        self._sampler = Sampler(model.decoder.vocab_size, most, model.compute.device)
        self._slots = list(range(most - 1, -1, -1))
        self._waiting: deque[Run] = deque()
        self._running: list[Run] = []

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Let go of weights and memory. Requests that are not done are forgotten."""
        self._engine.close()

    def measure_h2d(self) -> float | None:
        """Bytes per second of a copy of weights to the device; None on the CPU. Before the first
        step."""
        assert self.counts.walks == 0, "memory that keeps weights would be overwritten"
        return self._engine.store.measure_h2d()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def check(self, request: Request) -> None:
        """Raises InputError for what can never run."""
        decoder, longest = self.model.decoder, self.room.longest
        check_sampling(request.sampling, decoder.vocab_size)
        self._check_arm(request.arm)
        largest, smallest = max(request.ids, default=0), min(request.ids, default=0)
        if not request.ids:
            raise InputError("prompt: found no tokens, needed at least one")
        if len(request.ids) >= longest:
            raise InputError(
                f"prompt: found {len(request.ids)} tokens, needed fewer than {longest}, which "
                "prompt and answer may have together",
                hint="a shorter prompt, or a larger --max-length where the model allows it",
            )
        if smallest < 0 or largest >= decoder.vocab_size:
            raise InputError(
                f"prompt: found token id {largest if smallest >= 0 else smallest}, needed ids from "
                f"0 to {decoder.vocab_size - 1}",
                hint="tokenize with this model's own tokenizer",
            )

    def _check_arm(self, arm: Arm) -> None:
        if arm in self._known:
            return
        check_arm(self.model, arm)
        if arm.fits and can_fit(self.model.decoder) and not self.model.reference:
            self._say(
                Fallback(
                    f"arm {arm.name}", "coordinates that are fitted to the reference text",
                    "those that follow from the weights", "the arm was not known at the start",
                )
            )  # fmt: skip
        self._known.add(arm)

    def submit(self, request: Request) -> None:
        """Queue what `check` lets through."""
        reach = min(len(request.ids) + request.sampling.max_new_tokens, self.room.longest)
        text = Text(request.arm, reach, self.model.decoder.num_hidden_layers)
        stream = None
        if self.tokenizer is not None:
            before = request.ids if request.continues else ()
            stream = TextStream(self.tokenizer, request.sampling.stop, before)
        self._waiting.append(Run(request, text, stream, list(request.ids)))

    def cancel(self, request: str) -> None:
        """The next step ends it as "cancelled"; nothing happens to an unknown one."""
        for run in (*self._running, *self._waiting):
            if run.request.id == request:
                run.cancelled = True

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One walk over the weights: a token for every request whose prompt has been read."""
        outputs = self._end_cancelled()
        self._set_back()
        self._admit()
        if self._running:
            outputs += self._walk()
        return outputs

    def _end_cancelled(self) -> list[Output]:
        gone = [run for run in (*self._running, *self._waiting) if run.cancelled]
        return [self._end(run, "cancelled") for run in gone]

    def _cost(self, run: Run, tokens: int) -> float:
        """Bytes that a text of so many tokens takes on the device."""
        row = self._token_bytes * capacity_for(tokens, run.text.reach)
        return SPARE * row + run.text.packed_bytes

    def _set_back(self) -> None:
        """Requests from the newest on, until all others have room for their next tokens."""
        for run in self._running:
            run.rides = min(run.unread, self.room.rows)
        needed = [self._cost(run, run.text.end + run.rides) for run in self._running]
        while len(self._running) > 1 and sum(needed) > self.room.kept_bytes:
            run = self._running.pop()
            needed.pop()
            self._put_aside(run)
            self._waiting.appendleft(run)
            self.counts.set_back += 1

    def _put_aside(self, run: Run) -> None:
        held = sum(one.text.aside_bytes for one in self._waiting)
        room = held + self._cost(run, max(run.text.end, 1)) <= self.room.host_bytes
        self._caches.leave(run.text, aside=room)
        if not room:
            run.text.forget()
            if run.request.arm.codec is not None:
                self._say(
                    Fallback(
                        f"request {run.request.id}", "its cache to wait in host memory",
                        "its text read anew", "--ram has no room; its tokens may differ",
                    )
                )  # fmt: skip
        self._sampler.remove(run.slot)
        self._slots.append(run.slot)

    def _admit(self) -> None:
        """Waiting requests, the first first, while there is memory and rows of a walk for them."""
        rows = sum(run.rides for run in self._running)
        used = sum(self._cost(run, run.text.end + run.rides) for run in self._running)
        while self._waiting and self._slots:
            run = self._waiting[0]
            rides = min(run.unread, self.room.rows)
            cost = self._cost(run, run.text.end + rides)
            if self._running and (
                used + cost > self.room.kept_bytes or rows + rides > self.room.rows
            ):
                return
            self._waiting.popleft()
            run.rides, run.slot = rides, self._slots.pop()
            self._sampler.add(run.slot, run.request.sampling, run.ids, run.made)
            self._running.append(run)
            rows, used = rows + rides, used + cost

    def _walk(self) -> list[Output]:
        for run in self._running:
            self._caches.make_room(run.text, run.text.end + run.rides)
        of = {
            Passage(run.text, tuple(run.ids[run.text.end : run.text.end + run.rides])): run
            for run in self._running
        }
        rode = tuple(Rider(r.request.arm, r.text.end, r.rides) for r in self._running)
        try:
            walked = walk(self._engine, self._caches, list(of), self._progress, self._turn)
        except torch.OutOfMemoryError as error:
            return self._make_do(error)
        self._count(rode, walked.record)
        broken = {of[passage]: layer for passage, layer in walked.broken.items()}
        outputs = [
            self._end(run, "error", error=f"non-finite numbers from layer {layer} on")
            for run, layer in broken.items()
        ]
        read = [(of[passage], logits) for passage, logits in walked.logits.items()]
        ready = [(run, row) for run, row in read if not run.unread and run not in broken]
        return outputs + self._choose(ready) if ready else outputs

    def _make_do(self, error: torch.OutOfMemoryError) -> list[Output]:
        """Memory has ended in the middle of a walk: from here on less of it is for keys and values.
        Rows are as they were; coded texts may have taken some tokens, and are read anew."""
        torch.cuda.empty_cache()
        if len(self._running) == 1:
            return [self._end(self._running[0], "error", error="out of device memory")]
        used = sum(self._cost(run, run.text.end + run.rides) for run in self._running)
        less = int(LESS * min(used, self.room.kept_bytes))
        wanted, found = format_bytes(self.room.kept_bytes), format_bytes(less)
        self._say(Fallback("keys and values", wanted, found, str(error).split(". ")[0]))
        self.room = replace(self.room, kept_bytes=less)
        for run in self._running:
            if run.request.arm.codec is not None:
                self._caches.leave(run.text)
                run.text.forget()
        return []

    def _count(self, rode: tuple[Rider, ...], record: SweepRecord) -> None:
        """A walk, and who rode."""
        counts, engine = self.counts, self._engine
        self.rode = rode
        counts.walks += 1
        for run, rider in zip(self._running, rode, strict=True):
            counts.prompt_tokens += max(0, min(rider.tokens, len(run.request.ids) - rider.past))
        counts.weight_bytes_read, counts.weight_bytes_copied = engine.bytes_read, engine.h2d_bytes
        counts.copy_s, counts.stall_s = engine.store.copy_s, engine.stall_s
        counts.launch_s = self._turn.held_s
        for phase, seconds in record.seconds.items():
            counts.phases[phase] = counts.phases.get(phase, 0.0) + seconds

    def _choose(self, ready: Sequence[tuple[Run, Tensor]]) -> list[Output]:
        """The next token of each, from its logits [1, V]."""
        logits = torch.cat([row for _, row in ready])
        chosen = self._sampler.choose(logits, [run.slot for run, _ in ready])
        every = zip(
            ready, chosen.broken.tolist(), chosen.ids.tolist(), chosen.logprobs.tolist(),
            chosen.top_ids.tolist(), chosen.top_logprobs.tolist(), strict=True,
        )  # fmt: skip
        return [
            self._end(run, "error", error="non-finite logits")
            if broken
            else self._take(run, token, logprob, list(zip(ids, logprobs, strict=True)))
            for (run, _), broken, token, logprob, ids, logprobs in every
        ]

    def _take(self, run: Run, token: int, logprob: float, top: list[tuple[int, float]]) -> Output:
        """One more token of a request."""
        sampling, text = run.request.sampling, ""
        finish: Finish | None = None
        run.ids.append(token)
        self.counts.tokens += 1
        ended = token in self.config.ends and not sampling.ignore_eos
        if run.stream is not None and not ended:
            text = run.stream.push(token)
        if ended or (run.stream is not None and run.stream.stopped):
            finish = "stop"
        elif run.made >= sampling.max_new_tokens or len(run.ids) >= self.room.longest:
            finish = "length"
        output = Output(run.request.id, token, text, logprob, tuple(top[: sampling.logprobs]))
        return output if finish is None else self._end(run, finish, output)

    def _end(
        self, run: Run, finish: Finish, last: Output | None = None, error: str | None = None
    ) -> Output:
        """Its last output: `last`, with what the text still holds back, or one without a token."""
        if run in self._running:
            self._running.remove(run)
            self._sampler.remove(run.slot)
            self._slots.append(run.slot)
        else:
            self._waiting.remove(run)
        self._caches.leave(run.text)
        last = last or Output(run.request.id)
        rest = "" if run.stream is None or error else run.stream.finish()
        return replace(last, text=last.text + rest, finish=finish, error=error)
