"""The four lines that every run prints first, and diagnosis.json when it fails."""

from __future__ import annotations

import json
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console

from layersweep.checkpoint.layout import Checkpoint, Weight
from layersweep.environment import host_memory, versions
from layersweep.errors import Fallback
from layersweep.runs.files import write_atomically
from layersweep.runs.shard import WHOLE, Shard
from layersweep.study.meter import host_bytes
from layersweep.study.study import Study
from layersweep.sweep.model import Model
from layersweep.sweep.streams import state_bytes
from layersweep.units import format_bytes

LAST_EVENTS = 50


class Events:
    """Says lines on stderr and remembers the last of them for diagnosis.json."""

    def __init__(self, console: Console, shard: Shard = WHOLE) -> None:
        self.console, self.shard = console, shard
        self._last: deque[dict[str, Any]] = deque(maxlen=LAST_EVENTS)

    def say_once(self, line: str) -> None:
        """What every process of a host would say alike: the first one does."""
        self.note(line)
        if self.shard.local_rank == 0:
            self._print(line)

    def say(self, line: str) -> None:
        self.note(line)
        self._print(f"{self.shard}: {line}" if self.shard.of > 1 else line)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def say_fallback(self, fallback: Fallback) -> None:
        self.say(f"fallback: {fallback}")

    def note(self, line: str) -> None:
        self._last.append({"time": round(time.time(), 3), "event": line})

    def write_diagnosis(self, folder: Path, failure: BaseException, study: Study | None) -> Path:
        """OUT/diagnosis.json: what failed, where, with what layout, memory and versions."""
        gate = study.gate if study else None
        last = gate.checks[-1] if gate and gate.checks else None
        layer = last.layer if last else None
        content = {
            "error": str(failure),
            "kind": type(failure).__name__,
            "hint": getattr(failure, "hint", ""),
            "layer": layer,
            "tensor": None if layer is None else f"layers.{layer}",
            "value": last.value if last else None,
            "layout": _layer_layout(study.model.checkpoint, layer or 0) if study else None,
            "gate": gate.report() if gate else None,
            "memory": {"process_bytes": host_bytes(), "available_bytes": host_memory().available},
            "versions": dict(versions()),
            "events": list(self._last),
            "traceback": traceback.format_exception(failure),
        }
        path = folder / "diagnosis.json"
        write_atomically(path, json.dumps(content, indent=1, default=str))
        return path


def layout_line(checkpoint: Checkpoint) -> str:
    """`[layout]`: one attention weight, one of an MLP or expert, the router as they lie in the
    file."""
    names = list(checkpoint.weights)
    firsts = (
        next((name for name in names if name.endswith(end)), None)
        for end in ("o_proj", "down_proj", ".router")
    )
    return "[layout] " + "; ".join(_describe(checkpoint.weights[name]) for name in firsts if name)


def paths_line(model: Model, host: str) -> str:
    """`host`: where weights wait, as the plan says."""
    paths, compute = model.paths, model.compute
    dtype = str(compute.dtype).removeprefix("torch.")
    capability = f" sm_{compute.capability[0]}{compute.capability[1]}" if compute.capability else ""
    return (
        f"[paths] device {compute.device}{capability}, {dtype}; model={paths.model}; kernels: "
        f"{paths.kernels}; dequant: {paths.dequant}; experts: {paths.experts}; attention: "
        f"{paths.attention}; host: {host}"
    )


def budget_line(study: Study) -> str:
    model, generation = study.model, study.generation
    tiles = f"{len(study.own)} tiles"
    if study.shard.of > 1:
        tiles = f"shard {study.shard}: {len(study.own)} of {len(study.tiles)} tiles"
    ways = [f"{len(study.sweep_plan.sweeps)} sweep(s)"] if study.sweep_plan else []
    plans = [study.sweep_plan] if study.sweep_plan else []
    if generation:
        plans += [stage.plan for stage in generation.stages]
        ways.append(f"{len(generation.units)} unit(s) of generation, {generation.walks} walks")
        if len(generation.stages) > 1:
            held = (f"{s.layers.start}-{s.layers.stop - 1}" for s in generation.stages)
            ways.append(f"layers {' and '.join(held)} on a device each")
    states = state_bytes(model.decoder)
    kept = f"; a sequence keeps {format_bytes(states)} of states" if states else ""
    return (
        f"[budget] vram {format_bytes(model.vram.bytes)} ({model.vram.source}), ram "
        f"{format_bytes(model.ram.bytes)} ({model.ram.source}); planned working set "
        f"{format_bytes(study.planned_device_bytes)}, {tiles} in {', '.join(ways)}; "
        f"{format_bytes(sum(plan.bytes_to_read for plan in plans))} to read{kept}"
    )


def versions_line() -> str:
    found = versions()
    return "[versions] " + " ".join(f"{name} {value}" for name, value in found.items() if value)


def _describe(weight: Weight) -> str:
    stored, companions = weight.data, weight.storage.companions
    shape = "x".join(str(size) for size in weight.shape)
    extra = f" + {companions} companions" if companions else ""
    return f"{stored.name} {weight.describe()} ({shape}){extra}"


def _layer_layout(checkpoint: Checkpoint, layer: int) -> dict[str, str]:
    start = f"layers.{layer}."
    return {
        name: _describe(weight)
        for name, weight in checkpoint.weights.items()
        if name.startswith(start)
    }
