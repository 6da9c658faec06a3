"""The settings of an evaluation, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layersweep.errors import InputError
from layersweep.text.bos import BosMode

DEPTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
TASKS = ("ppl", "niah")
SHORTEN = "smaller --prefix, --continuation or --niah-context"


@dataclass(frozen=True)
class EvalSettings:
    """What `layersweep eval` is asked to do; field names are the command's options."""

    kv: str = "K3V2,K4V2"
    tasks: tuple[str, ...] = TASKS
    text: str | None = None
    segments: int | None = 80
    prefix: int = 1024
    continuation: int = 512
    bos: BosMode = "auto"
    cache_mode: Literal["prefill", "streaming"] = "prefill"
    niah_contexts: tuple[int, ...] = (4096,)
    niah_depths: tuple[float, ...] = DEPTHS
    niah_per_depth: int = 6
    niah_keys: int = 1
    niah_mode: Literal["teacher", "generate"] = "teacher"
    gate: Literal["first", "only", "off"] = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            _choice("--tasks", task, TASKS)
        if not self.tasks:
            raise InputError("--tasks: found nothing, needed ppl, niah or both", hint="--tasks ppl")
        _choice("--cache-mode", self.cache_mode, ("prefill", "streaming"))
        _choice("--niah-mode", self.niah_mode, ("teacher", "generate"))
        _choice("--gate", self.gate, ("first", "only", "off"))
        _choice("--bos", self.bos, ("auto", "always", "never"))
        if self.seed < 0:
            raise InputError(f"--seed: found {self.seed}, needed 0 or more", hint="--seed 0")
        if self.generates and self.cache_mode == "streaming":
            raise InputError(
                "--niah-mode generate: found --cache-mode streaming, needed prefill: generated "
                "tokens would have to be re-encoded at every step",
                hint="--niah-mode teacher, or --cache-mode prefill",
            )

    @property
    def streaming(self) -> bool:
        return self.cache_mode == "streaming"

    @property
    def generates(self) -> bool:
        return "niah" in self.tasks and self.niah_mode == "generate"

    @property
    def only_generates(self) -> bool:
        """Whether nothing but generated answers is asked for."""
        return self.generates and self.tasks == ("niah",)


def parse_tasks(text: str) -> tuple[str, ...]:
    """ "ppl,niah" -> ("ppl", "niah")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_segments(text: str) -> int | None:
    """A count, or None for "all"."""
    if text == "all":
        return None
    return _whole("--segments", text)


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """ "4096,8192" -> (4096, 8192)."""
    return tuple(_whole(option, part) for part in text.split(","))


def parse_depths(text: str) -> tuple[float, ...]:
    """ "0.1,0.5" -> (0.1, 0.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--niah-depths: found '{text}', needed numbers from 0 to 1 with commas between",
            hint="--niah-depths 0.1,0.5,0.9",
        ) from error


def _whole(option: str, text: str) -> int:
    try:
        value = int(text.strip())
    except ValueError as error:
        raise InputError(
            f"{option}: found '{text}', needed a whole number", hint=f"for example {option} 80"
        ) from error
    if value < 1:
        raise InputError(f"{option}: found {value}, needed 1 or more", hint=f"{option} 1 or more")
    return value


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            f"{option}: found '{value}', needed {' or '.join(allowed)}",
            hint=f"{option} {allowed[0]}",
        )
