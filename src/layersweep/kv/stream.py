"""What a layer keeps of the tokens: its streams, one vector per token and head each, or a state.
Knows nothing of how they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kv.basis import Basis
    from layersweep.kv.fit import Prediction

Role = Literal["key", "value", "latent"]


class Rotation(Protocol):
    """RoPE of a stream: x [B,H,T,D] float32 at `positions` [B,T], all rows of which are alike."""

    def undo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor: ...

    def redo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Stream:
    """One tensor [batch, heads, tokens, dim] that a layer keeps, for example its keys.

    `rope`: attention sees this stream rotated by position. A codec always sees it before that.
    `rotation` is for callers that only have it rotated: undone before a codec and done again after
    it, while exact tokens stay as they came. `window`: how many tokens the layer can look at, the
    newest included, None for all. `basis`: the layer's own coordinates for codecs with
    `wants_basis`, None for those that the stream comes in. `prediction`: what its layer's keys, the
    stream before it, say of values, where codecs encode the rest.

    A codec spends its value bits on the role `value` and its key bits on the others: a latent,
    from which keys are computed too, and its rotary part decide where attention looks.
    """

    name: str
    heads: int
    dim: int
    role: Role
    rope: bool
    window: int | None = None
    basis: Basis | None = None
    rotation: Rotation | None = None
    prediction: Prediction | None = None

    def first_held(self, tokens: int) -> int:
        """Position of the first token that is still needed when `tokens` are there: the next one
        looks at itself and at `window` - 1 before it."""
        return first_held(tokens, self.window)


def first_held(tokens: int, window: int | None) -> int:
    """See Stream.first_held."""
    return 0 if window is None else max(tokens - window + 1, 0)


@dataclass(frozen=True)
class State:
    """What a layer without keys keeps of all tokens together, always exact: the state of a
    recurrence or a convolution. `elements` numbers of `bits` bits for a sequence of any length."""

    name: str
    elements: int
    bits: int = 16


def keys_and_values(
    heads: int, dim: int, window: int | None = None, value_dim: int | None = None
) -> tuple[Stream, Stream]:
    """What an attention layer with rotary keys keeps, `heads` its KV heads. Values have the head
    size `value_dim`, that of the keys by default."""
    return (
        Stream("k", heads, dim, role="key", rope=True, window=window),
        Stream("v", heads, value_dim or dim, role="value", rope=False, window=window),
    )


def latent_streams(
    latent_dim: int, rope_dim: int, window: int | None = None
) -> tuple[Stream, Stream]:
    """What a layer with multi-head latent attention keeps: the latent, from which the keys and
    values of all heads are computed, and the rotary part that all their keys share."""
    return (
        Stream("latent", 1, latent_dim, role="latent", rope=False, window=window),
        Stream("k_rope", 1, rope_dim, role="key", rope=True, window=window),
    )
