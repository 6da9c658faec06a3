"""Bits given by layer, from what coding each layer alone was seen to cost.

`layersweep calibrate` measures a model once and writes a file; an arm K3V2@calibration=FILE reads
it. The bits of its name are then means, and every layer's keys and values get bits of their own.
Costs of layers add up closely (docs/codecs.md), so the sum of what was measured is made small.

Bits move only between layers that keep the same tokens: with sliding windows, too, the mean holds
at every length of the text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layersweep.errors import InputError
from layersweep.kv.methods import EXACT_BITS

SCHEMA = "layersweep.calibration/1"
MEASURED_BITS = (1, 2, 3, 4)
HINT = "`layersweep calibrate MODEL --text FILE --out FILE.json` writes one"


@dataclass(frozen=True)
class Cost:
    """Of a layer's keys or values: numbers per token, and the mean KL(exact || coded) of logits,
    nats per token, with nothing else coded; `nats` at each of MEASURED_BITS."""

    elements: int
    nats: tuple[float, ...]


@dataclass(frozen=True)
class LayerCosts:
    """None for what a layer does not have: a latent counts as keys. `window`: tokens that the
    layer looks at, None for all."""

    keys: Cost | None
    values: Cost | None
    window: int | None = None

    @property
    def both(self) -> tuple[Cost | None, Cost | None]:
        return self.keys, self.values


@dataclass(frozen=True)
class Calibration:
    """What was measured: `model` and `fingerprint` of a checkpoint, `text_sha256` and shape of the
    windows, `arms` at MEASURED_BITS. `name` and `sha256` are of the file."""

    model: str
    fingerprint: str
    text_sha256: str
    windows: int
    prefix: int
    continuation: int
    arms: tuple[str, ...]
    layers: tuple[LayerCosts, ...]
    name: str = ""
    sha256: str = ""

    def bits(self, key_bits: float, value_bits: float) -> list[tuple[int, int]]:
        """Bits of keys and values in each layer, whose mean over numbers is at most that of the
        bits given. 16 bits leave keys or values exact, and the mean is that of the others. Raises
        InputError for a mean that no bits have."""
        means = (key_bits, value_bits)
        for mean in means:
            if mean != EXACT_BITS and not MEASURED_BITS[0] <= mean <= MEASURED_BITS[-1]:
                raise InputError(
                    f"@calibration={self.name}: found a mean of {mean:g} bits, needed "
                    f"{MEASURED_BITS[0]} to {MEASURED_BITS[-1]}, or {EXACT_BITS}"
                )
        found = [[EXACT_BITS, EXACT_BITS] for _ in self.layers]
        for window in dict.fromkeys(layer.window for layer in self.layers):
            group = [
                (index, role, cost)
                for index, layer in enumerate(self.layers)
                if layer.window == window
                for role, cost in enumerate(layer.both)
                if cost is not None and means[role] != EXACT_BITS
            ]
            budget = sum(means[role] * cost.elements for _, role, cost in group)
            given = allocate([cost for *_, cost in group], budget)
            for (index, role, _), bits in zip(group, given, strict=True):
                found[index][role] = bits
        return [(keys, values) for keys, values in found]

    def check_model(self, num_layers: int, fingerprint: str | None = None) -> None:
        """Raise InputError unless this is of a model with so many layers and, where it is known,
        of the same checkpoint."""
        if num_layers != len(self.layers):
            found, needed = f"{len(self.layers)} layers", f"{num_layers}, as the model has"
        elif fingerprint is not None and fingerprint != self.fingerprint:
            found, needed = f"fingerprint {self.fingerprint[:12]}", fingerprint[:12]
        else:
            return
        raise InputError(
            f"@calibration={self.name}: found {found} of {self.model}, needed {needed}",
            hint=f"calibrate this model: {HINT}",
        )


def allocate(costs: Sequence[Cost], budget: float) -> list[int]:
    """Bits of each, so that the sum of bits x elements is at most `budget` and that of nats small.

    Greedy: all start at 1 bit, and the step that saves most nats per bit of storage comes next, as
    long as one fits. Steps may skip bits: a measured cost need not be convex.
    """
    chosen = [0] * len(costs)  # indices into MEASURED_BITS
    left = budget - sum(MEASURED_BITS[0] * cost.elements for cost in costs)
    while True:
        steps = [
            ((cost.nats[at] - cost.nats[to]) / size, index, to, size)
            for index, (cost, at) in enumerate(zip(costs, chosen, strict=True))
            for to in range(at + 1, len(MEASURED_BITS))
            if (size := (MEASURED_BITS[to] - MEASURED_BITS[at]) * cost.elements) <= left
        ]
        if not steps:
            return [MEASURED_BITS[at] for at in chosen]
        _, index, to, size = max(steps, key=lambda step: step[0])
        chosen[index], left = to, left - size


def write_calibration(path: Path, found: Calibration) -> None:
    """One layer per line."""
    content = asdict(found)
    layers = content.pop("layers")
    del content["name"], content["sha256"]
    lines = [f'"schema": "{SCHEMA}"', f'"bits": {list(MEASURED_BITS)}']
    lines += [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    rows = ",\n  ".join(json.dumps(layer, allow_nan=False) for layer in layers)
    lines.append(f'"layers": [\n  {rows}\n ]')
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n", "utf-8")


def read_calibration(path: Path) -> Calibration:
    """Raises InputError for a file that is not there or is no calibration."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"@calibration={path}: found {error.strerror}, needed a calibration", hint=HINT
        ) from error
    try:
        content = json.loads(data)
        if (content.pop("schema"), content.pop("bits")) != (SCHEMA, list(MEASURED_BITS)):
            raise ValueError(f"its schema is not {SCHEMA}")
        layers = tuple(_layer(**layer) for layer in content.pop("layers"))
        arms, digest = tuple(content.pop("arms")), hashlib.sha256(data).hexdigest()
        return Calibration(**content, arms=arms, layers=layers, name=path.stem, sha256=digest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"@calibration={path}: found no calibration ({error}), needed {SCHEMA}", hint=HINT
        ) from error


def _layer(
    keys: Mapping[str, Any] | None, values: Mapping[str, Any] | None, window: int | None
) -> LayerCosts:
    both = [None if cost is None else _cost(**cost) for cost in (keys, values)]
    return LayerCosts(both[0], both[1], window)


def _cost(elements: int, nats: Sequence[float]) -> Cost:
    if len(nats) != len(MEASURED_BITS):
        raise ValueError(f"{len(nats)} costs where {len(MEASURED_BITS)} bits were measured")
    for cost in nats:
        if not math.isfinite(cost):
            raise ValueError(f"{cost} nats")
    return Cost(elements, tuple(nats))
