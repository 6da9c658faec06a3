"""What a calibration holds: what each layer's keys and values cost at each number of bits."""

from __future__ import annotations

import math
from pathlib import Path

from layersweep.bench.sensitivity import KEYS, VALUES, Part, Sensitivity
from layersweep.errors import InputError
from layersweep.kv.arms import Arm, parse
from layersweep.kv.calibration import MEASURED_BITS, Calibration, Cost, LayerCosts
from layersweep.kv.stream import Stream
from layersweep.sweep.model import Model
from layersweep.sweep.streams import layer_streams


def arms_to_measure() -> list[Arm]:
    """The default method at each number of bits, with what it needs on real models."""
    return [parse(f"K{bits}V{bits}") for bits in MEASURED_BITS]


def calibration_of(model: Model, found: Sensitivity) -> Calibration:
    """`found`: of `arms_to_measure`."""
    layers = [
        LayerCosts(
            _cost(found, layer, KEYS, [stream for stream in streams if stream.role != "value"]),
            _cost(found, layer, VALUES, [stream for stream in streams if stream.role == "value"]),
            streams[0].window if streams else None,
        )
        for layer, streams in enumerate(layer_streams(model.decoder))
    ]
    checkpoint, sample = model.checkpoint, found.sample
    return Calibration(
        model=Path(checkpoint.source).name, fingerprint=checkpoint.fingerprint,
        text_sha256=found.text.sha256, windows=sample.segments, prefix=sample.prefix,
        continuation=sample.continuation, arms=tuple(found.arms), layers=tuple(layers),
    )  # fmt: skip


def _cost(found: Sensitivity, layer: int, stream: str, streams: list[Stream]) -> Cost | None:
    if not streams:
        return None
    nats = [found.nats(arm, Part(stream, layer)) for arm in found.arms]
    if not all(map(math.isfinite, nats)):
        raise InputError(
            f"layer {layer}: found predictions that are not finite with its {stream} coded, "
            "needed finite ones",
            hint="see `layersweep bench codec --model`",
        )
    elements = sum(one.heads * one.dim for one in streams)
    return Cost(elements, tuple(float(f"{cost:.4g}") for cost in nats))
