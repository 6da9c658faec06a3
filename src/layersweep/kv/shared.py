"""What arms have in common while the same tokens go into their streams."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layersweep.kv.encoded import Encoded


@dataclass(frozen=True)
class Prepared:
    """Tokens in a codec's coordinates, and their channel means if it wants them."""

    of: Hashable
    x: Tensor
    mean: Tensor | None


@dataclass
class Shared:
    """What streams have in common while the same tokens are appended to them under several arms,
    for which it starts empty.

    encoded    whole encodings (K3V2 and K4V2: the values)
    prepared   by stream, what the last codec encoded (K3V2 and K4V2: the keys), with its means
    """

    encoded: dict[Hashable, Encoded] = field(default_factory=dict)
    prepared: dict[str, Prepared] = field(default_factory=dict)
    _positions: Tensor | None = None

    def positions(self, batch: int, start: int, stop: int, device: torch.device) -> Tensor:
        """start, start + 1, ... stop - 1 for each of `batch` sequences."""
        known = self._positions
        if known is None or len(known) < stop:
            known = self._positions = torch.arange(stop, device=device)
        return known[start:stop].expand(batch, -1)
