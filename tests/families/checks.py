"""layersweep beside transformers on one tiny model: what the tests assert, and what
tools/measure_families.py prints."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from families import cached, oracle, ours
from families.changes import changes, unknown
from families.nf4 import rounded
from families.probe import (
    NEEDLE_ANSWER,
    NEEDLE_PREFIX,
    PREFIX,
    QUESTION,
    STEPS,
    Losses,
    needle_ids,
    window_ids,
)
from families.small import Tiny, read_fields, write_config
from layersweep.errors import InputError
from layersweep.families.spec import Decoder
from layersweep.kv import parse
from layersweep.kv.store import KvStore
from layersweep.sweep.streams import streams_of

TOLERANCE = 1e-4  # of a mean loss
MOVES = 1e-3  # what a changed field must do to the losses of transformers


@dataclass
class Subject:
    """A tiny model: its folder, and transformers' reading of it."""

    tiny: Tiny
    folder: Path
    model: PreTrainedModel = field(repr=False)
    expected: Losses = field(repr=False)

    @classmethod
    def of(cls, tiny: Tiny, folder: Path) -> Subject:
        oracle.make(tiny, folder)
        model = oracle.opened(folder)
        return cls(tiny, folder, model, oracle.losses(model))

    @cached_property
    def prefixes(self) -> list[tuple[cached.Prefilled, Tensor]]:
        """transformers' caches of the windows and of the needle, and what continues them."""
        vocab = self.model.get_output_embeddings().weight.shape[0]
        needle = needle_ids(vocab)
        cuts = [(ids, PREFIX) for ids in window_ids(vocab)] + [(needle, NEEDLE_PREFIX)]
        return [(cached.prefilled(self.model, ids[:cut]), ids[cut:]) for ids, cut in cuts]

    @cached_property
    def at_once(self) -> bool:
        """Whether transformers' own cache, untouched, continues a prefix by many tokens as its
        forward pass does; Mamba 1 (Jamba) drops its state there, but not for a single token.

        Raises NotImplementedError where neither does.
        """
        for at_once in (True, False):
            found = self.continued(None, at_once=at_once)
            if found.distance(self.expected) < TOLERANCE:
                return at_once
        raise NotImplementedError("transformers' cache does not continue its own forward pass")

    def continued(
        self, through: cached.Through | None, *, at_once: bool, as_seen: Container[int] = ()
    ) -> Losses:
        """transformers' losses behind its caches, replaced by what `through` makes of them."""
        found = [
            cached.branch_losses(
                self.model, prefix, branch, through, at_once=at_once, as_seen=as_seen
            )
            for prefix, branch in self.prefixes
        ]
        return Losses(torch.stack(found[:-1]), found[-1][-NEEDLE_ANSWER:])


@dataclass(frozen=True)
class Exact:
    """Differences of mean losses of the exact arm."""

    prefill: float
    streaming: float
    needle: float

    @property
    def largest(self) -> float:
        return max(self.prefill, self.streaming, self.needle)


def exact(subject: Subject) -> Exact:
    """In both modes of the cache."""
    model = ours.opened(subject.folder)
    windows, needle = ours.losses(model).distances(subject.expected)
    streaming = ours.losses(model, streaming=True).distance(subject.expected)
    return Exact(windows, streaming, needle)


def generated(subject: Subject) -> float:
    """The difference of token losses where each token takes a sweep of its own."""
    mine = ours.stepped_losses(ours.opened(subject.folder))
    theirs = subject.expected.windows[:, QUESTION - 1 : QUESTION - 1 + STEPS]
    return (mine - theirs).abs().max().item()


def nf4(subject: Subject) -> float:
    """The difference under `--weights nf4`; that NF4 itself moves the losses is asserted."""
    expected = oracle.losses(rounded(subject.model))
    assert expected.distance(subject.expected) > MOVES
    return ours.losses(ours.opened(subject.folder, "nf4")).distance(expected)


@dataclass(frozen=True)
class Changed:
    """What became of one field: how far transformers moved, and layersweep's distance from it, or
    the words with which it refused."""

    field: str
    moved: float
    distance: float | None
    refused: str = ""

    @property
    def equal(self) -> bool:
        return self.distance is not None and self.distance < TOLERANCE

    def complaint(self, tiny: Tiny) -> str:
        """Empty where all is as it must be."""
        if (self.moved < MOVES) != (self.field in tiny.still):
            return f"{self.field} moved transformers by {self.moved:.1e}"
        if not self.refused and not self.equal:
            return f"{self.field}: {self.distance:.1e} from transformers, moved {self.moved:.1e}"
        if self.refused and self.field.rpartition(".")[2] not in self.refused:
            return f"{self.field} is not named by: {self.refused}"
        return ""


def changed(subject: Subject) -> Iterator[Changed]:
    """One field of config.json after the other set to another value, on the same weights."""
    ours.opened(subject.folder)  # what is refused as it is says so here
    folder = subject.folder / "changed"
    for name, fields in changes(read_fields(subject.folder)):
        if name in subject.tiny.unfit:
            continue
        config = write_config(folder, fields)
        _share_weights(subject.folder, folder)
        theirs = oracle.losses(oracle.rebuilt(subject.model, config))
        moved = theirs.distance(subject.expected)
        try:
            distance = ours.losses(ours.opened(folder)).distance(theirs)
        except InputError as error:
            yield Changed(name, moved, None, str(error))
        else:
            yield Changed(name, moved, distance)


def through_arm(subject: Subject, name: str) -> tuple[float, float]:
    """(difference of the losses of an arm, what the arm does to them)."""
    model = ours.opened(subject.folder)
    codec = codec_of(name, model.decoder)
    layers = model.decoder.generic.layers if model.decoder.generic else ()
    blind = {at for at, layer in enumerate(layers) if not layer.turning}  # which the run says
    theirs = subject.continued(codec, at_once=subject.at_once, as_seen=blind)
    mine = ours.losses(model, parse(name))
    return mine.distance(theirs), theirs.distance(subject.expected)


def codec_of(name: str, decoder: Decoder) -> cached.Through:
    """decode(encode) of what a layer keeps of a prefix (before RoPE), without the sweep."""
    arm = parse(name)

    def through(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        streams = streams_of(decoder.layers[layer].attention)
        store = KvStore.empty([(arm, streams)], layer, len(decoder.layers))
        decoded_keys, decoded_values = store.appended((keys, values)).decoded(0)
        return decoded_keys, decoded_values

    return through


def complaints(subject: Subject) -> list[str]:
    """All that is wrong with fields: nobody knows one, or it does not move as it must."""
    unlooked = [f"{field}: not in changes.py" for field in unknown(read_fields(subject.folder))]
    found = [one.complaint(subject.tiny) for one in changed(subject)]
    return unlooked + [complaint for complaint in found if complaint]


def _share_weights(folder: Path, other: Path) -> None:
    """Hard links: a file that leads out of its folder would be refused."""
    for file in folder.glob("*.safetensors*"):
        if not (other / file.name).exists():
            os.link(file, other / file.name)
