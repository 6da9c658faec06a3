"""RoPE of a transformers model, undone and done again by the model's own tables and functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layersweep.errors import InputError


@dataclass(frozen=True)
class Rope:
    """kv.stream.Rotation by a model's rotary module and the function of its file that applies it.

    `arguments`: what the module needs besides x and positions, where it has a table for each type
    of layer. `apply`: (x, cos, sin) -> x rotated; None where tables are complex. `size`: how many
    of a vector's first numbers are rotated.
    """

    rotary: Any
    arguments: tuple[str, ...]
    apply: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    size: int

    @classmethod
    def of(cls, rotary: Any, layer_type: str | None) -> Rope:
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        arguments = (layer_type,) if by_type and layer_type else ()
        name = "_".join((*arguments, "inv_freq"))
        frequencies = getattr(rotary, name, None)
        if frequencies is None:
            raise InputError(
                f"{type(rotary).__name__}: found no table {name}, needed it to undo RoPE",
                hint="run this model with transformers' own cache",
            )
        start = torch.zeros(1, 1, dtype=torch.long, device=frequencies.device)
        is_complex = isinstance(rotary(frequencies, start, *arguments), Tensor)
        apply = None if is_complex else _applied_by(sys.modules[type(rotary).__module__])
        return cls(rotary, arguments, apply, 2 * frequencies.numel())

    def undo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor:
        return self._turned(x_BHTD, positions, back=True)

    def redo(self, x_BHTD: Tensor, positions: Tensor) -> Tensor:
        return self._turned(x_BHTD, positions, back=False)

    def _turned(self, x_BHTD: Tensor, positions: Tensor, *, back: bool) -> Tensor:
        table = self.rotary(x_BHTD, positions[:1], *self.arguments)
        if self.apply is None:  # complex [1, T, D / 2], for pairs of neighbours
            pairs = torch.view_as_complex(x_BHTD.reshape(*x_BHTD.shape[:-1], -1, 2))
            factor = table.unsqueeze(1)
            return torch.view_as_real(pairs / factor if back else pairs * factor).flatten(3)
        cos, sin = (part.float() for part in table)  # [1, T, R], or R / 2 in some models
        turned = self.apply(x_BHTD[..., : self.size], cos, -sin if back else sin)
        if back:  # the inverse of a rotation that some models scale
            square = (cos * cos + sin * sin).unsqueeze(1)
            turned = turned / square.repeat(1, 1, 1, self.size // square.shape[3])
        rest = x_BHTD[..., self.size :]
        return torch.cat((turned, rest), dim=3) if rest.shape[3] else turned


def _applied_by(module: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """See Rope.apply. Of what applies RoPE to a query and a key, or to one of them."""
    function = getattr(module, "apply_rotary_pos_emb", None)
    names = list(inspect.signature(function).parameters) if function else []
    if names[1:3] == ["cos", "sin"]:
        return lambda x, cos, sin: function(x, cos, sin)  # type: ignore[misc]
    if names[2:4] == ["cos", "sin"]:
        return lambda x, cos, sin: function(x[:1, :1], x, cos, sin)[1]  # type: ignore[misc]
    raise InputError(
        f"{module.__name__}: found no apply_rotary_pos_emb(q, k, cos, sin), needed it to undo RoPE"
    )
