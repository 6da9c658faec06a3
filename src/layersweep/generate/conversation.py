"""A chat: its history, the cache that it is read through, and one answer at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from layersweep.generate.request import Finish, Request, Sampling, Steps
from layersweep.kv.arms import EXACT, Arm
from layersweep.text.chat import Message
from layersweep.text.tokenizer import TextTokenizer


@dataclass
class Answer:
    """What one answer was, up to now. `prompt`: tokens that were read before it; `reading_s`: until
    its first token; `writing_s`: from there to its last. `error`: why it ended without a reason of
    its own."""

    prompt: int
    text: str = ""
    tokens: int = 0
    reading_s: float = 0.0
    writing_s: float = 0.0
    finish: Finish | None = None
    error: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first, which is part of the reading."""
        return (self.tokens - 1) / self.writing_s if self.tokens > 1 and self.writing_s else None


class Conversation:
    """Turns of user and assistant, all of which each answer reads.

    `system`: what the model is told first. `history`: a question that got no answer is not part of
    it. Raises InputError for an arm or sampling that the model cannot have.
    """

    def __init__(
        self, steps: Steps, tokenizer: TextTokenizer, sampling: Sampling,
        arm: Arm = EXACT, system: str | None = None,
    ) -> None:  # fmt: skip
        self.steps, self.tokenizer, self.sampling = steps, tokenizer, sampling
        self._system = [] if system is None else [Message("system", system)]
        self._asked = 0
        self.history: list[Message] = []
        self.use(arm)

    def use(self, arm: Arm) -> None:
        """Read from here on through this cache. Raises InputError where the model cannot."""
        self.steps.check(Request("arm", (0,), self.sampling, arm))
        self.arm = arm

    def reset(self) -> None:
        """Forget all turns; the system's message stays."""
        self.history.clear()

    def answer(self, said: str, stop: Callable[[], bool]) -> tuple[Answer, Iterator[str]]:
        """What is known of the answer, which grows as its text is taken from the iterator.

        `stop` is asked before every step; if it says yes, the answer ends, and what there is of it
        is kept. Raises InputError for a history that is too long, or that the template refuses.
        """
        messages = [*self._system, *self.history, Message("user", said)]
        self._asked += 1
        ids = tuple(self.tokenizer.encode_messages(messages))
        name = f"chat-{self._asked}"
        request = Request(name, ids, self.sampling, self.arm, continues=False)
        self.steps.check(request)
        answer = Answer(len(ids))
        return answer, self._run(request, answer, said, stop)

    def _run(
        self, request: Request, answer: Answer, said: str, stop: Callable[[], bool]
    ) -> Iterator[str]:
        began = first = time.perf_counter()
        self.steps.submit(request)
        try:
            while answer.finish is None:
                if stop():
                    self.steps.cancel(request.id)
                outputs = [one for one in self.steps.step() if one.request == request.id]
                for output in outputs:
                    now = time.perf_counter()
                    if output.token is not None:
                        first = now if answer.tokens == 0 else first
                        answer.tokens += 1
                        answer.reading_s, answer.writing_s = first - began, now - first
                    answer.text += output.text
                    answer.finish, answer.error = output.finish, output.error
                    if output.text:
                        yield output.text
        finally:  # a step failed, or nobody listens any more
            if answer.finish is None:
                self.steps.cancel(request.id)
        if answer.text and answer.error is None:
            self.history += [Message("user", said), Message("assistant", answer.text)]
