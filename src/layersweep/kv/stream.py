"""What a layer keeps of every token: its streams. Knows nothing of how they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from layersweep.kv.basis import Basis

Role = Literal["key", "value", "latent"]


@dataclass(frozen=True)
class Stream:
    """One tensor [batch, heads, tokens, dim] that a layer keeps, for example its keys.

    `rope` says that the model rotates this stream by position after it has been read (a codec
    always sees it before that rotation). `window` is the number of past tokens that the layer
    can attend to, None for all. `basis`: the layer's own coordinates for it, None for those that
    it comes in; for codecs with `wants_basis`.
    """

    name: str
    heads: int
    dim: int
    role: Role
    rope: bool
    window: int | None = None
    basis: Basis | None = None


def keys_and_values(heads: int, dim: int, window: int | None = None) -> tuple[Stream, Stream]:
    """What an attention layer with rotary keys keeps, `heads` its KV heads."""
    return (
        Stream("k", heads, dim, role="key", rope=True, window=window),
        Stream("v", heads, dim, role="value", rope=False, window=window),
    )
