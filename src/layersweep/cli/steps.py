"""What commands that generate have in common: options of sampling, and the scheduler they open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console

from layersweep.units import format_bytes

if TYPE_CHECKING:  # torch loads only once the arguments are known to be good
    from layersweep.cli.job import MachineOptions
    from layersweep.errors import Fallback
    from layersweep.generate.request import Sampling
    from layersweep.generate.scheduler import Scheduler
    from layersweep.kv.arms import Arm
    from layersweep.sweep.model import Model
    from layersweep.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class SamplingOptions:
    """What the command line says of sampling; None where it leaves the model's own."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None

    def over(self, own: Sampling) -> Sampling:
        """The model's sampling with these in its place. A temperature of 0 takes the likeliest
        token; any other samples."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.temperature is not None:
            given["do_sample"] = self.temperature != 0
            if self.temperature == 0:
                del given["temperature"]
        return replace(own, **given)


@dataclass(frozen=True)
class Prepared:
    """A model whose headers and tokenizer are read, and how it is sampled."""

    model: Model
    tokenizer: TextTokenizer
    sampling: Sampling


def prepare(source: str, machine: MachineOptions, options: SamplingOptions) -> Prepared:
    """Raises what load and TextTokenizer.load raise."""
    from layersweep.generate.config import GenerationConfig
    from layersweep.sweep.choices import generation_dtype
    from layersweep.sweep.model import load
    from layersweep.text.tokenizer import TextTokenizer

    machine = replace(machine, dtype=generation_dtype(machine.dtype, machine.device))
    model = load(source, **asdict(machine))
    folder = model.checkpoint.folder
    sampling = options.over(GenerationConfig.read(folder).sampling)
    return Prepared(model, TextTokenizer.load(folder), sampling)


@contextmanager
def scheduled(
    ready: Prepared, arms: Sequence[Arm], console: Console, *, most: int, longest: int | None,
    brief: bool = False,
) -> Iterator[Scheduler]:  # fmt: skip
    """A scheduler for texts under `arms`; tells of the model, its paths and its memory, or, if it
    shall be brief, of notes and fallbacks alone."""
    from layersweep.cli.events import layout_line, paths_line, versions_line
    from layersweep.generate.scheduler import Scheduler

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def tell(fallback: Fallback) -> None:
        say(f"fallback: {fallback}")

    model = ready.model
    with Scheduler(
        model, ready.tokenizer, arms=arms, most=most, longest=longest, say=tell
    ) as scheduler:
        room = scheduler.room
        for note in (*model.checkpoint.notes, *ready.tokenizer.notes):
            say(f"note: {note}")
        for fallback in model.compute.fallbacks:
            tell(fallback)
        if brief:
            yield scheduler
            return
        say(layout_line(model.checkpoint))
        say(paths_line(model, room.host))
        say(
            f"[budget] vram {format_bytes(model.vram.bytes)} ({model.vram.source}), ram "
            f"{format_bytes(model.ram.bytes)} ({model.ram.source}); planned working set "
            f"{format_bytes(room.plan.device_bytes)}, {format_bytes(room.kept_bytes)} of it for "
            f"keys and values; at most {room.most} texts at once, of {room.longest} tokens at most"
        )
        say(versions_line())
        yield scheduler
