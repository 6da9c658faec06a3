"""What everything that is attended in one layer shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from layersweep.checkpoint.config import ModelConfig
from layersweep.kv.arms import Arm
from layersweep.kv.basis import Basis, key_basis
from layersweep.kv.codec import wants_basis
from layersweep.kv.stream import Stream, keys_and_values
from layersweep.model.compute import Compute, Scratch
from layersweep.sweep.caches import KeptCaches
from layersweep.sweep.dense import DenseWeights


@dataclass
class LayerContext:
    """Of one visit of a layer."""

    config: ModelConfig
    layer: int
    weights: DenseWeights
    cos: Tensor
    sin: Tensor
    compute: Compute
    scratch: Scratch
    # (tile name, arm) -> [bits stored, elements they stand for]
    cache_bits: dict[tuple[str, str], list[float]]
    # None in evaluations, which drop a layer's keys and values
    caches: KeptCaches | None = None

    @cached_property
    def plain_streams(self) -> tuple[Stream, Stream]:
        """Keys and values, in the coordinates that they come in."""
        config = self.config
        return keys_and_values(config.num_key_value_heads, config.head_dim, config.sliding_window)

    def streams(self, arm: Arm) -> tuple[Stream, Stream]:
        """Keys, with the layer's own coordinates where the arm asks for them, and values."""
        keys, values = self.plain_streams
        wanted = arm.codec is not None and wants_basis(arm.codec)
        return (replace(keys, basis=self.basis) if wanted else keys), values

    @cached_property
    def basis(self) -> Basis:
        weights = self.weights
        return key_basis(weights.q_proj, weights.k_proj, weights.input_norm, self.config.head_dim)

    def rope(self, x_BHTD: Tensor, first: int, out: Tensor) -> Tensor:
        return self.compute.ops.rope(x_BHTD, self.cos, self.sin, first, out)

    def place(self, x_BGTD: Tensor, stream: Stream, first: int, out: Tensor) -> None:
        """Copy tokens to where attention reads them, turned to positions from `first` on if the
        model turns that stream."""
        if stream.rope:
            self.rope(x_BGTD, first, out)
        else:
            out.copy_(x_BGTD)

    def take_like(self, x_BGTD: Tensor, tokens: int) -> Tensor:
        """Scratch for keys or values of `tokens` tokens."""
        batch, heads, _, dim = x_BGTD.shape
        return self.scratch.take(batch, heads, tokens, dim, dtype=self.compute.dtype)
