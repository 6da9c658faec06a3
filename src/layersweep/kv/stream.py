"""What a layer keeps of every token: its streams. Knows nothing of how they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["key", "value", "latent"]


@dataclass(frozen=True)
class Stream:
    """One tensor [batch, heads, tokens, dim] that a layer keeps, for example its keys.

    `rope` says that the model rotates this stream by position after it has been read (a codec
    always sees it before that rotation). `window` is the number of past tokens that the layer
    can attend to, None for all.
    """

    name: str
    heads: int
    dim: int
    role: Role
    rope: bool
    window: int | None = None
