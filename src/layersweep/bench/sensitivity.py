"""What each stream of each layer costs alone, on a model's own keys and values, in one sweep.

Of an arm K3V2 every window gets a branch with everything coded, one with all keys, one with all
values, and for each layer one with its keys and one with its values alone. Their logits are
compared with those of the exact cache: loss and KL. As a layer is visited, the branches of its own
streams still have the exact cache's queries: KL of attention and the error of attention's output
are theirs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layersweep.errors import InputError
from layersweep.families.spec import Decoder
from layersweep.kv.arms import Arm
from layersweep.kv.methods import EXACT_BITS, METHODS
from layersweep.study.fitting import fitting_arms
from layersweep.sweep.generic_limits import check_modules
from layersweep.sweep.model import Model
from layersweep.sweep.record import Progress
from layersweep.sweep.sequences import tiles_of
from layersweep.sweep.shapes import check_length
from layersweep.sweep.streams import every_stream, layer_streams
from layersweep.sweep.watch import Attended
from layersweep.tasks.finite import finite
from layersweep.tasks.perplexity.numbers import PerplexityNumbers
from layersweep.tasks.perplexity.task import PerplexityTask
from layersweep.text.bos import resolve_bos
from layersweep.text.encoding import EncodedText
from layersweep.text.reference import with_reference
from layersweep.text.source import SourceText, load_text
from layersweep.text.tokenizer import TextTokenizer, check_ids
from layersweep.text.windows import cut_windows

Json = dict[str, Any]
BOTH, KEYS, VALUES = "everything", "keys", "values"


@dataclass(frozen=True)
class Sample:
    """Windows of a text. All tokens of a continuation but the first are scored."""

    text: str | None = None
    segments: int = 4
    prefix: int = 1024
    continuation: int = 128


@dataclass(frozen=True)
class Part:
    """What is coded: KEYS, VALUES or BOTH, of one layer or of all."""

    stream: str
    layer: int | None = None


Parts = dict[Part, Arm]


def parts_of(arm: Arm, decoder: Decoder) -> Parts:
    """The arm that codes each part alone. Raises InputError for an arm that does not code every
    layer alike, or whose keys and values cannot be told apart."""
    fixed = arm.method in METHODS and METHODS[arm.method].fixed_bits
    partial = arm.layers is not None or arm.protect or arm.calibration
    if arm.codec is None or arm.method == "identity" or fixed or partial:
        raise InputError(
            f"--kv: found {arm.requested}, needed an arm with bits K..V.. that codes every layer: "
            "its keys and values are coded alone",
            hint="--kv K3V2",
        )
    roles = [{stream.role for stream in streams} for streams in layer_streams(decoder)]
    having = {
        KEYS: [layer for layer, found in enumerate(roles) if found - {"value"}],
        VALUES: [layer for layer, found in enumerate(roles) if "value" in found],
    }
    bits = {KEYS: arm.key_bits, VALUES: arm.value_bits}
    parts = [Part(BOTH)]
    for stream, layers in having.items():
        if layers and bits[stream] != EXACT_BITS:
            parts += [Part(stream), *(Part(stream, layer) for layer in layers)]
    return {part: _coding(arm, part) for part in parts}


def _coding(arm: Arm, part: Part) -> Arm:
    """Named as its user would write it."""
    keys = EXACT_BITS if part.stream == VALUES else arm.key_bits
    values = EXACT_BITS if part.stream == KEYS else arm.value_bits
    name = arm.name.replace(f":K{arm.key_bits}V{arm.value_bits}", f":K{keys}V{values}")
    layers = None
    if part.layer is not None:
        name, layers = f"{name}@layers={part.layer}", range(part.layer, part.layer + 1)
    return replace(arm, name=name, key_bits=keys, value_bits=values, layers=layers)


@dataclass
class AttentionErrors:
    """Sums over windows, queries and heads, by the name of an arm that codes one layer: KL of
    attention and how many; squared error and energy of attention's output."""

    names: dict[int, dict[str, bool]]  # of a layer: arms, and whether they code keys
    kl: dict[str, list[Tensor]] = field(default_factory=dict)
    output: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, every: Sequence[Parts]) -> AttentionErrors:
        names: dict[int, dict[str, bool]] = {}
        for parts in every:
            for part, arm in parts.items():
                if part.layer is not None:
                    names.setdefault(part.layer, {})[arm.name] = part.stream == KEYS
        return cls(names)

    def __call__(self, seen: Attended) -> None:
        branches = [branch.arm.name for branch in seen.group.sequences[0].branches]
        exact = seen.out[:, :, seen.branch(0)].double()
        for name, has_keys in self.names.get(seen.layer, {}).items():
            index = branches.index(name)
            error = seen.out[:, :, seen.branch(index)].double() - exact
            squares = torch.stack((error.square().sum(), exact.square().sum()))
            self.output.setdefault(name, []).append(squares)
            if has_keys:
                kl = seen.divergence(index)
                self.kl.setdefault(name, []).append(kl.double().mean())

    def figures(self, name: str) -> Json:
        """None where nothing was seen."""
        found: Json = {"attention_kl": None, "output_error": None}
        if name in self.kl:
            found["attention_kl"] = finite(torch.stack(self.kl[name]).mean().item())
        if name in self.output:
            error, energy = torch.stack(self.output[name]).sum(0).tolist()
            found["output_error"] = finite(error / energy) if energy else None
        return found


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of each arm's parts. `bits`: per element, by the name of an arm."""

    text: SourceText
    sample: Sample
    arms: dict[str, Parts]
    numbers: PerplexityNumbers
    attention: AttentionErrors
    bits: dict[str, float | None]

    def nats(self, arm: str, part: Part) -> float:
        """Mean KL(exact || coded) of logits per scored token."""
        return float(self.numbers.kl[self.arms[arm][part].name].mean())

    def row(self, arm: str) -> Json:
        """An arm's figures: all at once, each stream, and each stream of each layer."""
        parts = self.arms[arm]
        found: Json = {"job": arm, "bits_per_element": self.bits[arm]}
        layers: dict[int, Json] = {}
        for part, coding in parts.items():
            figures = self._figures(coding.name)
            if part.layer is None:
                found[part.stream] = figures
            else:
                alone = figures | self.attention.figures(coding.name)
                layers.setdefault(part.layer, {"layer": part.layer})[part.stream] = alone
        return found | {"layers": [layers[layer] for layer in sorted(layers)]}

    def _figures(self, name: str) -> Json:
        kl = self.numbers.kl[name].astype(np.float64).mean(axis=1)
        delta = self.numbers.nll[name] - self.numbers.nll["exact"]
        return {
            "kl": finite(kl.mean()), "kl_sem": _sem(kl),
            "delta_nll": finite(delta.mean()), "delta_nll_sem": _sem(delta),
        }  # fmt: skip


def _sem(x: NDArray[np.float64]) -> float | None:
    return finite(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else None


def measure_parts(
    model: Model,
    arms: Sequence[Arm],
    sample: Sample,
    progress: Progress = lambda phase, done, total: None,
) -> Sensitivity:
    """Each arm's parts on the windows of a sample, in one sweep if they fit the device at once: a
    tile is one window with all branches. Raises InputError for what cannot be measured."""
    decoder, compute = model.decoder, model.compute
    fitting_arms(arms, every_stream(decoder), compute.device, compute.dtype)
    check_modules(decoder, arms, generates=False)
    check_length(decoder, sample.prefix + sample.continuation, "smaller --prefix")
    of_arms = {arm.name: parts_of(arm, decoder) for arm in arms}
    text = load_text(sample.text, model.checkpoint.source)
    tokenizer = TextTokenizer.load(model.checkpoint.folder)
    model = with_reference(model, arms, tokenizer, resolve_bos(tokenizer, "auto"))
    encoded = EncodedText(text.text, tokenizer, model.ram.bytes)
    windows = cut_windows(
        encoded, segments=sample.segments, prefix=sample.prefix,
        continuation=sample.continuation, bos="auto",
    )  # fmt: skip
    for window in windows:
        check_ids(window.ids, decoder.vocab_size)
    every = {arm.name: arm for parts in of_arms.values() for arm in parts.values()}
    score = compute.ops.score_branches
    task = PerplexityTask(windows, list(every.values()), False, compute.device, score)
    attention = AttentionErrors.of(list(of_arms.values()))
    sequences = [sequence for tile in task.tiles() for sequence in tile.sequences]
    tiles = tiles_of(task.name, sequences, 1)
    record = model.run(tiles, task.read, watch=attention, progress=progress)
    task.settle()
    task.check_baseline(0, len(windows))
    bits = {
        name: finite(stored / elements)
        for (_, name), (stored, elements) in record.cache_bits.items()
        if elements
    }
    return Sensitivity(text, sample, of_arms, task.numbers, attention, bits)
