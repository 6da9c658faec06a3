"""What is asked of a scheduler, and what it answers: requests in, tokens and text out. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from layersweep.kv.arms import EXACT, Arm

# "stop": an end token or a stop string. "length": max_new_tokens, or the model's longest text.
Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names and defaults are transformers'.

    Without `do_sample` the likeliest token is taken, and `temperature`, `top_k`, `top_p` and
    `min_p` change nothing. `top_k` 0 means all tokens. `seed`: the same seed gives the same tokens
    whatever else runs; None draws one. `stop`: strings that end the text and are not part of it.
    `logprobs`: how many likeliest tokens each step reports beside its own.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt `ids` to continue, with the keys and values of the whole text kept as `arm`.

    `continues`: the answer's text goes on from the prompt's, blank and all; else it is a text of
    its own, as an answer in a chat is (SentencePiece puts a blank before a first word).
    """

    id: str
    ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    arm: Arm = EXACT
    continues: bool = True


@dataclass(frozen=True)
class Output:
    """What one step gave to a request.

    `token`: the id that was chosen; None if the request ended without one. `text`: the whole
    characters that are certain by now. `logprob`: of the token, natural, before temperature; `top`:
    (id, logprob) of the likeliest, the likeliest first. `finish`: why this is the last output.
    """

    request: str
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    error: str | None = None


class Steps(Protocol):
    """A scheduler, as those who drive it see it. One thread calls it."""

    def check(self, request: Request) -> None:
        """Raises InputError for what can never run: too long, no tokens, an unknown id, a bad
        sampling value."""

    def submit(self, request: Request) -> None:
        """Queue it; `check` comes first."""

    def cancel(self, request: str) -> None:
        """End it: the next step reports it as "cancelled". Nothing happens to an unknown one."""

    def step(self) -> list[Output]:
        """One walk over the weights: waiting requests are read, running ones get a token each."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def idle(self) -> bool:
        """Nothing runs or waits."""
