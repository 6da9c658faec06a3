"""What the commands of `layersweep bench` begin and end with: a model under its budget, and a line.

Progress goes to stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layersweep.errors import InputError
from layersweep.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from layersweep.sweep.model import Model


def load_for_bench(
    model: str, vram: str, ram: str, device: str, capability: str | None, *, on_cpu: bool = False,
    dtype: str = "auto",
) -> Model:  # fmt: skip
    """The model with its budget enforced by torch's own allocator; `on_cpu` where there is one, if
    that can be measured, too."""
    import torch

    from layersweep.sweep.model import load

    loaded = load(
        model, vram=vram, ram=ram, device=device, dtype=dtype, assume_capability=capability
    )
    if loaded.cpu and on_cpu:
        return loaded
    if loaded.cpu:
        raise InputError(
            f"--device {device}: found the CPU, needed a GPU to measure its bus and its products",
            hint="on the CPU, `layersweep bench decode`, or time `layersweep eval demo`",
        )
    place = loaded.compute.device
    total = torch.cuda.get_device_properties(place).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, loaded.vram.bytes / total), place)
    for fallback in loaded.compute.fallbacks:
        say(f"fallback: {fallback.what}: wanted {fallback.wanted}, used {fallback.used}: "
             f"{fallback.why}")  # fmt: skip
    return loaded


def say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def print_line(
    name: str, model: Model, rows: list[dict[str, Any]], table: Table | None = None
) -> None:
    """A table for people on stderr, of headlines unless it is given; one JSON line on stdout."""
    from dataclasses import asdict

    from layersweep.environment import device_facts, versions

    if table is None:
        table = Table(box=None, pad_edge=False, show_header=False)
        for row in rows:
            table.add_row(Text(str(row["job"]), "bold"), Text(headline(row)))
    Console(stderr=True).print(table)
    line = {
        "bench": name,
        "rows": rows,
        "device": device_facts(str(model.compute.device)),
        "capability": model.compute.capability,
        "paths": asdict(model.paths),
        "model": {"source": Path(model.checkpoint.source).name, "bytes": model.checkpoint.nbytes,
                  "layers": model.checkpoint.decoder.num_hidden_layers},
        "vram_budget": model.vram.bytes,
        "ram_budget": model.ram.bytes,
        "versions": dict(versions()),
    }  # fmt: skip
    typer.echo(json.dumps(line, allow_nan=False))


def headline(row: dict[str, Any]) -> str:
    """A row's main figures."""
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    if "seconds_per_pass" in row:
        return (
            f"{format_seconds(row['seconds_per_pass'])} per forward pass of {row['layers']} layers"
        )
    words = [format_seconds(row["wall_s"])]
    if "speedup" in row:
        words.append(f"{row['speedup']:.2f} x as fast as one")
        words.append("same numbers" if row["same_numbers"] else "DIFFERENT NUMBERS")
    if "ratio" in row:
        words.append(f"{row['ratio']:.3f} x its floor of {format_seconds(row['floor_s'])}")
        words.append(f"stalled {row['compute_stall_fraction']:.2%}")
        peak, planned = row["peak_device_bytes"], row["planned_device_bytes"]
        words.append(f"peak {format_bytes(peak)}, planned {format_bytes(planned)}")
    if "share_of_pinned_rate" in row:
        words.append(f"{row['share_of_pinned_rate']:.1%} of {row['pinned_gbps']:.1f} GB/s pinned")
    if "share_of_gemm_rate" in row:
        words.append(f"{row['share_of_gemm_rate']:.1%} of {row['gemm_ceiling_tflops']:.0f} TFLOP/s")
    return ", ".join(words)
