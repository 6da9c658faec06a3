"""`bench decode` and `bench batch`: tokens per second against the floor of the same run.

Prompts are random tokens, and an answer ends with its last token. Kernels are compiled, resident
weights are in place and codecs have run: a short answer comes before the clock starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from layersweep.bench.ceilings import gemm_ceiling, memory_rate
from layersweep.bench.walks import Costs, Rates, Walks
from layersweep.generate.counts import Counts
from layersweep.generate.request import Request, Sampling
from layersweep.generate.scheduler import Scheduler
from layersweep.kv.arms import Arm
from layersweep.sweep.model import Model

Json = dict[str, Any]
Say = Callable[[str], None]
WARM_TOKENS = 3  # of an answer before the clock: its prompt, and steps


@dataclass(frozen=True)
class Load:
    """`streams` texts at once, each of so many tokens that are read and made."""

    streams: int
    prompt_tokens: int
    new_tokens: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.new_tokens

    def prompts(self, vocab_size: int) -> list[tuple[int, ...]]:
        """Random ids; the first text is the same for any number of streams."""
        generator = torch.Generator().manual_seed(0)
        shape = self.streams, self.prompt_tokens
        return [
            tuple(ids) for ids in torch.randint(vocab_size, shape, generator=generator).tolist()
        ]


def bench_generation(model: Model, arms: Sequence[Arm], load: Load, say: Say) -> list[Json]:
    """A row per arm. One stream: its decoding. Several: reading and decoding apart, beside one
    stream through the same scheduler."""
    say("measuring memory" + (" and products" if load.streams > 1 else ""))
    memory, products = _rates(model, load)
    with Scheduler(
        model, arms=arms, most=load.streams, longest=load.length,
        say=lambda fallback: say(f"fallback: {fallback}"),
    ) as scheduler:  # fmt: skip
        rates = Rates(memory, scheduler.measure_h2d() or memory, products)
        return [_measured(scheduler, arm, load, rates, say) for arm in arms]


def _rates(model: Model, load: Load) -> tuple[float, float | None]:
    device, dtype = model.compute.device, model.compute.dtype
    memory = memory_rate(device)
    if load.streams == 1:
        return memory, None
    with model.compute.numerics():
        return memory, gemm_ceiling(model.decoder, device, dtype)


def _measured(scheduler: Scheduler, arm: Arm, load: Load, rates: Rates, say: Say) -> Json:
    model, room, one = scheduler.model, scheduler.room, replace(load, streams=1)
    costs = Costs(model, room, load.length)
    say(f"{arm.name}: warm-up")
    drive(scheduler, arm, replace(load, new_tokens=WARM_TOKENS), costs, rates)
    say(f"{arm.name}: measured run")
    before = scheduler.counts.set_back
    reading, decoding = drive(scheduler, arm, load, costs, rates)
    row: Json = {
        "job": arm.name,
        "requested": arm.requested,
        **asdict(load),
        "tokens_per_s": decoding.tokens_per_s,
        "share_of_floor": decoding.share_of_floor,
        "decode": _row(decoding, model),
        "prefill": _row(reading, model),
        "set_back": scheduler.counts.set_back - before,
        "keeps_dense": room.keeps_dense,
        "host": room.host,
        "memory_gbps": rates.memory / 1e9,
        "bring_gbps": rates.bring / 1e9,
        "gemm_tflops": rates.products / 1e12 if rates.products else None,
        "planned_device_bytes": room.plan.device_bytes,
        "peak_device_bytes": None,
    }
    if load.streams > 1:
        say(f"{arm.name}: one stream")
        alone = drive(scheduler, arm, one, costs, replace(rates, products=None))[1]
        row["one_stream"] = _row(alone, model)
        row["over_one_stream"] = decoding.tokens_per_s / alone.tokens_per_s
    if not model.cpu:
        reserved = torch.cuda.max_memory_reserved(model.compute.device)
        row["peak_device_bytes"] = reserved + model.context_bytes
    return row


def drive(
    scheduler: Scheduler, arm: Arm, load: Load, costs: Costs, rates: Rates
) -> tuple[Walks, Walks]:
    """All texts submitted at once: the walks that read a prompt, and those after the last one of
    these, in which every text gets a token."""
    sampling = Sampling(max_new_tokens=load.new_tokens, ignore_eos=True)
    for index, ids in enumerate(load.prompts(scheduler.model.decoder.vocab_size)):
        scheduler.submit(Request(str(index), ids, sampling, arm))
    reading, decoding = Walks(), Walks()
    cpu = scheduler.model.cpu
    while not scheduler.idle:
        before, started = _copied(scheduler.counts), time.perf_counter()
        outputs = scheduler.step()
        spent, after = time.perf_counter() - started, scheduler.counts
        reads = after.prompt_tokens > before.prompt_tokens
        walks = reading if reads else decoding
        walks.wall_s += spent
        made = sum(output.token is not None for output in outputs)
        walks.tokens += after.prompt_tokens - before.prompt_tokens if reads else made
        missed = (
            after.weight_bytes_read - before.weight_bytes_read
            if cpu
            else after.weight_bytes_copied - before.weight_bytes_copied
        )
        if after.walks > before.walks:  # else memory ended, and it is walked again
            walks.add(costs.of(scheduler.rode), missed, rates)
        walks.launch_s += after.launch_s - before.launch_s
        walks.copy_s += after.copy_s - before.copy_s
        walks.stall_s += after.stall_s - before.stall_s
        for phase, seconds in after.phases.items():
            more = seconds - before.phases.get(phase, 0.0)
            walks.phases[phase] = walks.phases.get(phase, 0.0) + more
    return reading, decoding


def _copied(counts: Counts) -> Counts:
    return replace(counts, phases=dict(counts.phases))


def _row(walks: Walks, model: Model) -> Json:
    """Of walks, as JSON; a walk by its parts, in milliseconds: those of the host and the bus, and
    those of the device, which go on beside them. On the CPU nothing is launched or copied."""
    count = max(walks.walks, 1)
    parts = {"host launches": walks.launch_s, "copies": walks.copy_s, "stalls": walks.stall_s}
    return {
        "tokens": walks.tokens,
        "tokens_per_s": walks.tokens_per_s,
        "walks": walks.walks,
        "wall_s": walks.wall_s,
        "floor_s": walks.floor_s,
        "share_of_floor": walks.share_of_floor,
        "missed_bytes_per_walk": walks.missed_bytes / count,
        "hit_rate": walks.hit_rate,
        "read_bytes_per_walk": walks.read_bytes / count,
        "flops_per_walk": walks.flops / count,
        "ms_per_walk": {
            **({} if model.cpu else {name: 1e3 * s / count for name, s in parts.items()}),
            **{name: 1e3 * s / count for name, s in walks.phases.items()},
        },
    }
