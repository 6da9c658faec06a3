"""What arms have in common while the same tokens go into their streams."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.kv.encoded import Encoded
from layersweep.kv.sinks import Found


@dataclass(frozen=True)
class Prepared:
    """Tokens in a codec's coordinates, their channel means if it wants them, and which of them are
    sinks if it moves those: in `x` they are moved, in `exact`, for what is fine, they are not."""

    of: Hashable
    x: Tensor
    mean: Tensor | None
    found: Found | None = None
    exact: Tensor | None = None


@dataclass
class Shared:
    """What streams have in common while the same tokens are appended to them under several arms,
    for which it starts empty.

    encoded    whole encodings (K3V2 and K4V2: the values)
    prepared   by stream, what the last codec encoded (K3V2 and K4V2: the keys), with its means
    coarse     by encoding and first token, keys as values have been predicted from them
    """

    encoded: dict[Hashable, Encoded] = field(default_factory=dict)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    coarse: dict[tuple[Encoded, int], Tensor] = field(default_factory=dict)
    _positions: Tensor | None = None

    def positions(self, batch: int, start: int, stop: int, device: torch.device) -> Tensor:
        """start, start + 1, ... stop - 1 for each of `batch` sequences."""
        known = self._positions
        if known is None or len(known) < stop:
            known = self._positions = torch.arange(stop, device=device)
        return known[start:stop].expand(batch, -1)

    def coarse_of(self, middle: Encoded, first: int) -> Tensor:
        """`middle.coarse(first)`, made once."""
        if (middle, first) not in self.coarse:
            self.coarse[middle, first] = middle.coarse(first)
        return self.coarse[middle, first]

    def read(self) -> dict[Encoded, Tensor]:
        """Of encodings that attention reads as values were predicted from them, what it reads."""
        return {
            middle: x
            for (middle, first), x in self.coarse.items()
            if first == 0 and middle.fine is None and middle.rotation is None
        }
