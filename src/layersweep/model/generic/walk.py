"""One tile's forward pass, that stops wherever it needs weights.

transformers' own forward runs in a thread and halts before each layer and at each set of experts,
until it is told to go on. One thread runs at a time: whoever calls `go` waits for the next halt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layersweep.families.generic.interfaces import Attend, Sight, visiting

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Rows(Protocol):
    """The rows of a tile: whose they are, which the modules that are called with them do not know.

    The three last call a module's own `forward` once or more, so that together it sees all rows.
    """

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        """Attention, keys after RoPE: [1, Q, N, D of a value]."""

    def by_sequence(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """For whole sequences, each with one branch."""

    def by_group(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """For a few sequences at a time, with all their branches."""

    def by_row(self, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """For some rows at a time."""


@dataclass(frozen=True)
class AtLayer:
    """Before layer `index`, or behind the last one, with the hidden states [N, H] so far."""

    index: int
    hidden_NH: Tensor


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
    """See the module's text. `forward()` is the base model's, hidden states [1, N, H]. Close it:
    a thread waits in it."""

    def __init__(self, forward: Callable[[], Tensor], rows: Rows, device: torch.device) -> None:
        self.rows = rows
        self.attend = rows.attend
        self._forward, self._device = forward, device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
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
        del at  # what it holds must not live as long as the thread waits
        told = self._told.get()
        if isinstance(told, _Left):
            raise told
        return told

    def sight(self, width: int | None, shows: Any) -> Sight:
        return Sight(width)

    def experts(
        self, module: nn.Module, rows_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        count = len(rows_NH)  # a model with one expert per token may leave out K
        experts_NK, weights_NK = experts_NK.reshape(count, -1), weights_NK.reshape(count, -1)
        found: Tensor = self.halt(AtExperts(module, rows_NH, experts_NK, weights_NK))
        return found

    def _run(self) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._device)
            stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            with stream, torch.inference_mode(), visiting(self):
                self._halts.put(Done(self._forward()[0]))
        except _Left:
            pass
        except BaseException as failure:  # the one who waits for the halt raises it
            self._halts.put(failure)
