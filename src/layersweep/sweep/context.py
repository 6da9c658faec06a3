"""What everything that is attended in one layer shares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layersweep.families.spec import Attention, Decoder, Layer, Norm, Rope
from layersweep.kv.arms import Arm
from layersweep.kv.basis import Basis, key_basis
from layersweep.kv.codec import wants_basis
from layersweep.kv.fit import Fit
from layersweep.kv.stream import Stream
from layersweep.model.attention import Rule
from layersweep.model.compute import Compute, Scratch
from layersweep.model.rope import rope_table
from layersweep.sweep.caches import KeptCaches
from layersweep.sweep.dense import Views
from layersweep.sweep.running import RunningCaches
from layersweep.sweep.sequences import BranchedSequence
from layersweep.sweep.streams import streams_of

if TYPE_CHECKING:
    from layersweep.sweep.watch import Watch

Table = tuple[Tensor, Tensor]  # cos and sin [positions, dim]


@dataclass
class RopeTables:
    """cos and sin of a sweep's positions, made once for each RoPE and, where it depends on that,
    length of the sequence."""

    longest: int
    compute: Compute
    _made: dict[tuple[Rope, int], Table] = field(default_factory=dict)

    def forget_lengths(self) -> None:
        """Drop what was made for one length, which a sequence that grows has once."""
        self._made = {at: made for at, made in self._made.items() if not at[0].depends_on_length}

    def of(self, rope: Rope, length: int) -> Table:
        """For a sequence of `length` tokens."""
        at = (rope, length if rope.depends_on_length else self.longest)
        if at not in self._made:
            positions = torch.arange(self.longest, device=self.compute.device)
            cos, sin = rope_table(rope, positions, at[1])
            self._made[at] = cos.to(self.compute.dtype), sin.to(self.compute.dtype)
        return self._made[at]


@dataclass
class LayerContext:
    """Of one visit of a layer."""

    decoder: Decoder
    index: int
    weights: Views
    tables: RopeTables
    compute: Compute
    scratch: Scratch
    # (tile name, arm) -> [bits stored, elements they stand for]
    cache_bits: dict[tuple[str, str], list[float]]
    # None in evaluations, which drop a layer's keys and values
    caches: KeptCaches | RunningCaches | None = None
    watch: Watch | None = None
    # of the reference text, where it rides; `fits`: the visit is that of the text itself
    fit: Fit | None = None
    fits: bool = False

    @property
    def layer(self) -> Layer:
        return self.decoder.layers[self.index]

    @property
    def attention(self) -> Attention:
        return self.layer.attention

    @property
    def inner_norm(self) -> Norm:
        """Of what attention norms within: queries, keys, latents."""
        return self.attention.norm or self.decoder.norm

    @cached_property
    def rule(self) -> Rule:
        return Rule.of(self.attention)

    @property
    def sinks(self) -> Tensor | None:
        return self.weights.get("sinks")

    @cached_property
    def plain_streams(self) -> tuple[Stream, ...]:
        """What a token leaves in the cache, in the coordinates that it comes in."""
        return streams_of(self.attention)

    def streams(self, arm: Arm) -> tuple[Stream, ...]:
        """The same with the layer's own coordinates for keys, where the arm asks for them: those
        of the reference text, or those that follow from the weights."""
        keys, *others = self.plain_streams
        if arm.codec is None or not wants_basis(arm.codec):
            return self.plain_streams
        if self.fit and arm.fits:
            (values,) = others
            return replace(keys, basis=self.fit.keys), replace(values, prediction=self.fit.values)
        if self.basis is None:
            return self.plain_streams
        return (replace(keys, basis=self.basis), *others)

    @cached_property
    def basis(self) -> Basis | None:
        """None where keys are more than a projection of normed rows."""
        if not self.layer.projects_keys:
            return None
        weights, dim = self.weights, self.attention.head_dim
        return key_basis(weights["q_proj"], weights["k_proj"], weights["attention_norm"], dim)

    def table(self, length: int) -> Table | None:
        """cos and sin for a sequence of `length` tokens; None where the layer turns nothing."""
        rope = self.attention.rope
        return None if rope is None else self.tables.of(rope, length)

    def turn(
        self, x_BHTD: Tensor, table: Table | None, first: int, out: Tensor,
        branched: tuple[int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Copy heads to `out` (which may be x), turned to positions from `first` on; `branched` as
        in TorchOps.rope."""
        rope = self.attention.rope
        if rope is None or table is None:
            return out if out is x_BHTD else out.copy_(x_BHTD)
        return self.compute.ops.rope(
            x_BHTD, *table, first, out, interleaved=rope.interleaved, branched=branched
        )

    def turn_branches(
        self, x_BHTD: Tensor, table: Table | None, sequence: BranchedSequence, out: Tensor
    ) -> Tensor:
        """The same of all rows of sequences of one shape: in one launch, where their branches are
        as long as each other."""
        prefix, lengths = len(sequence.prefix), [len(branch.ids) for branch in sequence.branches]
        if len(set(lengths)) == 1:
            return self.turn(x_BHTD, table, 0, out, (prefix, lengths[0]))
        parts = (torch.split(one, [prefix, *lengths], dim=2) for one in (x_BHTD, out))
        for index, (x, its_out) in enumerate(zip(*parts, strict=True)):
            self.turn(x, table, prefix if index else 0, its_out)
        return out

    def take_like(self, x_BGTD: Tensor, tokens: int) -> Tensor:
        """Scratch for keys or values of `tokens` tokens."""
        batch, heads, _, dim = x_BGTD.shape
        return self.scratch.take(batch, heads, tokens, dim, dtype=self.compute.dtype)
