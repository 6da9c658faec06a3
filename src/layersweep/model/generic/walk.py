"""One tile's forward pass, that stops wherever it needs weights.

transformers' own forward runs in a thread and halts before each layer and at each set of experts,
until it is told to go on. One thread runs at a time: whoever calls `go` waits for the next halt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from layersweep.model.generic.interfaces import Attend, Sight, visiting

Attention = Callable[[nn.Module, Tensor, Tensor, Tensor, Attend], Tensor]
SequenceWise = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class AtLayer:
    """Before a decoder layer, or after the last one (`index` is then their number)."""

    index: int


@dataclass(frozen=True)
class AtExperts:
    """Within a layer, waiting for the weighted sums [N, H] of `rows_NH` over their experts."""

    module: nn.Module
    rows_NH: Tensor
    experts_NK: Tensor
    weights_NK: Tensor


@dataclass(frozen=True)
class Done:
    """The hidden states [N, H] that the head reads."""

    hidden_NH: Tensor


Halt = AtLayer | AtExperts | Done


class _Left(BaseException):
    """Raised in a walk that nobody will follow any more."""


class Walk:
    """See the module's text. `forward()` is the base model's, hidden states [1, N, H].

    `attend` computes attention of the tile's rows; `by_sequence` calls a module for each sequence
    of the tile instead of for its rows. Close it: a thread hangs on it.
    """

    def __init__(
        self, forward: Callable[[], Tensor], attend: Attention, by_sequence: SequenceWise
    ) -> None:
        self.attend, self.by_sequence = attend, by_sequence
        self._forward = forward
        self._told: SimpleQueue[Any] = SimpleQueue()
        self._halts: SimpleQueue[Halt | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def go(self, answer: Tensor | None = None) -> Halt:
        """Go on to the next halt, with the sums if it was AtExperts. Raises what the model does."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._told.put(answer)
        found = self._halts.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        if self._thread.is_alive():
            self._told.put(_Left())
            self._thread.join()

    def halt(self, at: Halt) -> Any:
        """Called in the walk's own thread."""
        self._halts.put(at)
        told = self._told.get()
        if isinstance(told, _Left):
            raise told
        return told

    def sight(self, width: int | None, shows: Any) -> Sight:
        return Sight(width)

    def experts(
        self, module: nn.Module, rows_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        found: Tensor = self.halt(AtExperts(module, rows_NH, experts_NK, weights_NK))
        return found

    def _run(self) -> None:
        try:
            with torch.inference_mode(), visiting(self):
                self._halts.put(Done(self._forward()[0]))
        except _Left:
            pass
        except BaseException as failure:  # the one who waits for the halt raises it
            self._halts.put(failure)
