"""`layersweep plan`: placement, bytes, predicted peaks and times, from headers alone."""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from layersweep.errors import InputError
from layersweep.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from layersweep.checkpoint.weights import Checkpoint
    from layersweep.kv.arms import Arm
    from layersweep.stream.blocks import BlockSpec
    from layersweep.stream.rates import MachineRates
    from layersweep.study.forecast import Forecast
    from layersweep.tasks.settings import EvalSettings

Cheaper = list[tuple[str, float]]


def plan(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or demo.")] = "demo",
    machine: Annotated[
        str | None,
        typer.Option("--for", help="t4, t4x2, rtx4090, a100-40, a100-80, h200 or cpu."),
    ] = None,
    kv: Annotated[str, typer.Option(help="Arms besides `exact`.")] = "K3V2,K4V2",
    tasks: Annotated[str, typer.Option(help="ppl, niah, or both.")] = "ppl,niah",
    segments: Annotated[str, typer.Option(help="Perplexity windows.")] = "80",
    prefix: Annotated[int, typer.Option(help="Tokens that pass through the codec.")] = 1024,
    continuation: Annotated[int, typer.Option(help="Tokens scored after them.")] = 512,
    cache_mode: Annotated[str, typer.Option(help="prefill or streaming.")] = "prefill",
    niah_context: Annotated[str, typer.Option(help="Needle contexts in tokens.")] = "4096",
    niah_per_depth: Annotated[int, typer.Option(help="Needles per context and depth.")] = 6,
    niah_mode: Annotated[str, typer.Option(help="teacher or generate.")] = "teacher",
    vram: Annotated[
        str | None, typer.Option(help="Device budget instead of the machine's.")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Host budget instead of the machine's.")] = None,
    weights: Annotated[str, typer.Option(help="auto or native (as stored), or nf4.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Predict memory and time of an evaluation; reads headers, computes nothing."""
    from layersweep.kv.arms import parse_arms
    from layersweep.tasks.settings import EvalSettings, parse_counts, parse_segments

    settings = EvalSettings(
        kv=kv,
        tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()),
        segments=parse_segments(segments),
        prefix=prefix,
        continuation=continuation,
        cache_mode=cache_mode,  # type: ignore[arg-type]  # checked by EvalSettings
        niah_contexts=parse_counts("--niah-context", niah_context),
        niah_per_depth=niah_per_depth,
        niah_mode=niah_mode,  # type: ignore[arg-type]
    )
    if settings.segments is None:
        raise InputError(
            "--segments all: found no text to count windows in, needed a number",
            hint="--segments 80: plan reads headers, not texts",
        )
    if weights not in ("auto", "native", "nf4"):
        raise InputError(
            f"--weights: found '{weights}', needed auto, native or nf4", hint="--weights auto"
        )
    arms = parse_arms(kv, growing=settings.streaming)
    rates = _rates(machine, vram, ram)
    import torch

    from layersweep.checkpoint.layout import scan_checkpoint
    from layersweep.problems import printable, problems_error
    from layersweep.stream.blocks import block_specs
    from layersweep.study.fitting import fitting_arms
    from layersweep.study.forecast import forecast
    from layersweep.sweep.streams import every_stream, state_bytes

    checkpoint, problems = scan_checkpoint(model, revision)  # of a hub id, headers alone
    if checkpoint is None:
        raise problems_error(problems)
    specs = block_specs(checkpoint, quantize=weights == "nf4")
    cpu, streams = torch.device("cpu"), every_stream(checkpoint.decoder)
    for arm in arms:
        arm.check_model(checkpoint.decoder.num_hidden_layers, checkpoint.fingerprint)
    arms, left_out = fitting_arms(arms, streams, cpu, torch.float32)
    found = forecast(checkpoint.decoder, specs, settings, arms, rates)
    cheaper = _cheaper(checkpoint, specs, settings, arms, rates, found.total_s)
    if json_output:
        content = {
            "machine": dataclasses.asdict(rates),
            "forecast": _as_json(found),
            "cheaper": [{"settings": words, "total_s": seconds} for words, seconds in cheaper],
            "state_bytes": state_bytes(checkpoint.decoder),
            "left_out": [fallback._asdict() for fallback in left_out],
            "notes": list(checkpoint.notes),
        }
        typer.echo(json.dumps(content, default=sorted))  # of a placement, runs are sets
        return
    notes = [f"note: {printable(note)}" for note in checkpoint.notes]
    notes += [f"fallback: {fallback}" for fallback in left_out]
    if states := state_bytes(checkpoint.decoder):
        notes.append(f"note: a sequence keeps {format_bytes(states)} of states, of any length")
    _show(Console(), checkpoint, rates, found, cheaper, notes)


def _as_json(found: Forecast) -> dict[str, Any]:
    """Its fields, and the plan's peak; the seconds of each task as perplexity_s and so on."""
    content = dataclasses.asdict(found)
    content["plan"] |= {
        "device_bytes": found.plan.device_bytes,
        "host_bytes": found.plan.host_bytes,
    }
    return content | {f"{name}_s": spent for name, spent in content.pop("task_s").items()}


def _rates(name: str | None, vram: str | None, ram: str | None) -> MachineRates:
    """A shipped machine with "assumed" rates, or this one with its compute rate measured."""
    from layersweep.environment import ram_budget, vram_budget
    from layersweep.stream.rates import MACHINES
    from layersweep.units import parse_size

    if name is not None and name not in MACHINES:
        close = difflib.get_close_matches(name, MACHINES, n=1)
        raise InputError(
            f"--for: found '{name}', needed one of {', '.join(MACHINES)}",
            hint=f"did you mean {close[0]}?" if close else "--for t4",
        )
    if name is not None:
        rates = MACHINES[name]
    else:
        from layersweep.sweep.choices import resolve_device

        place = resolve_device("auto")
        host = ram_budget(ram or "auto")
        device = vram_budget(vram or "auto", place, host=host)
        rates = dataclasses.replace(
            MACHINES["cpu" if place == "cpu" else "h200"],
            name="this machine", vram=device.bytes, ram=host.bytes,
            gemm_flops=_measured_gemm(place), source="compute measured, disk and bus assumed",
        )  # fmt: skip
    if vram is not None:
        rates = dataclasses.replace(rates, vram=parse_size(vram, option="--vram"))
    if ram is not None:
        rates = dataclasses.replace(rates, ram=parse_size(ram, option="--ram"))
    return rates


def _measured_gemm(place: str) -> float:
    from layersweep.probes import cpu_gemm_rate, cuda_gemm_rate

    if place == "cpu":
        return cpu_gemm_rate((2048, 2048, 2048))
    return cuda_gemm_rate(place, (12800, 4096, 28672))


def _cheaper(
    checkpoint: Checkpoint,
    specs: list[BlockSpec],
    settings: EvalSettings,
    arms: list[Arm],
    rates: MachineRates,
    total_s: float,
) -> Cheaper:
    """Settings that take less time, still publishable first."""
    from layersweep.study.forecast import forecast

    options: dict[str, dict[str, Any]] = {
        "--segments 60 --niah-per-depth 6": {"segments": 60, "niah_per_depth": 6},
        "--niah-per-depth 2 (spot check)": {"niah_per_depth": 2},
        "--tasks ppl": {"tasks": ("ppl",)},
    }
    found = []
    for words, change in options.items():
        less = dataclasses.replace(settings, **change)
        seconds = forecast(checkpoint.decoder, specs, less, arms, rates).total_s
        if seconds < total_s:
            found.append((words, seconds))
    return found


def _show(
    console: Console,
    checkpoint: Checkpoint,
    rates: MachineRates,
    found: Forecast,
    cheaper: Cheaper,
    notes: list[str],
) -> None:
    from layersweep.tasks.registry import TASKS

    plan = found.plan
    console.print(
        f"{checkpoint.source}: {format_bytes(checkpoint.nbytes)} {checkpoint.storage}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"on {rates.name}: {rates.devices} x {format_bytes(rates.vram)}, host "
        f"{format_bytes(rates.ram)}; compute {rates.gemm_flops / 1e12:.3g} TFLOP/s, bus "
        f"{rates.h2d / 1e9:.3g} GB/s, disk {rates.disk / 1e9:.3g} GB/s ({rates.source})",
        highlight=False,
        soft_wrap=True,
    )
    if rates.devices > 1:
        share = f"{rates.devices} devices that share the tiles: `eval --device cuda:0,cuda:1`"
        notes = [*notes, f"note: times are for {share}"]
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, size in plan.peaks.items():
        table.add_row(name, format_bytes(size))
    table.add_row(
        "peak, predicted", f"{format_bytes(plan.device_bytes)} of {format_bytes(plan.vram)}"
    )
    table.add_row("weights kept in host memory", format_bytes(plan.host_kept_bytes))
    table.add_row("host ring", format_bytes(plan.placement.host_ring))
    if found.sweeps:
        table.add_row("sweeps", str(found.sweeps))
    if found.generation:
        table.add_row("answers generated", found.generation)
    table.add_row("read from the files", format_bytes(found.read_bytes))
    table.add_row("download, at 100 MB/s", format_seconds(found.download_s))
    table.add_row("first read", format_seconds(found.first_read_s))
    for kind in TASKS:
        table.add_row(kind.name, format_seconds(found.task_s[kind.name]))
    table.add_row("total, transfers overlapped", format_seconds(found.total_s))
    console.print(table)
    for words, seconds in cheaper:
        console.print(f"cheaper: {words}: {format_seconds(seconds)}", highlight=False)
