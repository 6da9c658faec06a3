"""A request that runs."""

from __future__ import annotations

from dataclasses import dataclass

from layersweep.generate.request import Request
from layersweep.sweep.running import Text
from layersweep.text.streaming import TextStream


@dataclass(eq=False)
class Run:
    """A request on its way. `ids`: its prompt and what has been chosen; `rides`: how many of them
    the walk reads that is next."""

    request: Request
    text: Text
    stream: TextStream | None
    ids: list[int]
    slot: int = -1
    rides: int = 0
    cancelled: bool = False

    @property
    def unread(self) -> int:
        """Tokens whose keys are not kept yet."""
        return len(self.ids) - self.text.end

    @property
    def made(self) -> int:
        return len(self.ids) - len(self.request.ids)
