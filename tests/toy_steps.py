"""A scheduler without a model: a token depends on the prompt, the seed and its place alone."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from dataclasses import dataclass, field

from layersweep.errors import InputError
from layersweep.generate.request import Output, Request
from layersweep.text.tokenizer import TextTokenizer

LONGEST = 4096
AT_ONCE = 8
WORDS = 300  # ids from here on are words, below them special tokens and bytes
NAN = 7  # a prompt that starts with this id has logits that are none
BROKEN = 8  # and with this one ends the engine


@dataclass
class _Running:
    request: Request
    ids: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0

    def output(self, tokenizer: TextTokenizer) -> Output:
        if self.request.ids[0] == NAN:
            return Output(self.request.id, finish="error", error="logits: found NaN in layer 0")
        sampling = self.request.sampling
        seed = (self.request.ids, sampling.seed, sampling.do_sample, len(self.ids))
        draw = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:4])
        self.ids.append(WORDS + draw % (tokenizer.tokenizer.get_vocab_size() - WORDS))
        self.text = tokenizer.decode(self.ids).rstrip("\ufffd")
        finish = "length" if len(self.ids) == sampling.max_new_tokens else None
        stops = [at for stop in sampling.stop if (at := self.text.find(stop)) >= 0]
        if stops:
            self.text, finish = self.text[: min(stops)], "stop"
        held = 0 if finish else max(map(len, sampling.stop), default=0)
        until = max(self.sent, len(self.text) - held)
        text, self.sent = self.text[self.sent : until], until
        top = tuple((self.ids[-1] + at, -1.0 - at) for at in range(sampling.logprobs))
        return Output(self.request.id, self.ids[-1], text, -1.0, top, finish)  # type: ignore[arg-type]


class ToySteps:
    """`turn` is cleared to hold the engine in its next step; `cancelled`: what was told to end."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.turn = threading.Event()
        self.turn.set()
        self.cancelled: list[str] = []
        self._waiting: deque[Request] = deque()
        self._running: dict[str, _Running] = {}
        self._ended: list[Output] = []

    def check(self, request: Request) -> None:
        if not request.ids:
            raise InputError("prompt: found no tokens, needed 1 or more", hint="write a prompt")
        if len(request.ids) >= LONGEST:
            found = f"{len(request.ids)} tokens"
            raise InputError(f"prompt: found {found}, needed fewer than {LONGEST}")
        vocab = self.tokenizer.tokenizer.get_vocab_size()
        if max(request.ids) >= vocab:
            raise InputError(f"prompt: found id {max(request.ids)}, needed ids below {vocab}")

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def cancel(self, request: str) -> None:
        known = [one for one in self._waiting if one.id == request]
        if known or request in self._running:
            self._waiting = deque(one for one in self._waiting if one.id != request)
            self._running.pop(request, None)
            self.cancelled.append(request)
            self._ended.append(Output(request, finish="cancelled"))

    def step(self) -> list[Output]:
        self.turn.wait(timeout=20)  # a failing test must not hang
        outputs, self._ended = self._ended, []
        while self._waiting and len(self._running) < AT_ONCE:
            request = self._waiting.popleft()
            if request.ids[0] == BROKEN:
                raise RuntimeError("the device fell off the bus")
            self._running[request.id] = _Running(request)
        outputs += [one.output(self.tokenizer) for one in self._running.values()]
        for output in outputs:
            if output.finish:
                self._running.pop(output.request, None)
        return outputs

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._ended)
