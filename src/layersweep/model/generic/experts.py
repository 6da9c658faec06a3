"""One expert: transformers' own gate and activation around two products.

A module with many experts keeps their matrices as one [E, ...] parameter each. Only one expert's
part is ever dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from layersweep.model.maths import linear


def expert_rows(module: nn.Module, one: Mapping[str, Tensor], x_NH: Tensor) -> Tensor:
    """What an expert makes of rows. `one`: its parts of the module's parameters, by their names.

    The layout flags are those of transformers.integrations.moe.use_experts_implementation.
    """
    of: Any = module
    inner = _product(x_NH, one, "gate_up_proj" if of.has_gate else "up_proj", of)
    inner = of._apply_gate(inner) if of.has_gate else of.act_fn(inner)
    found = _product(inner, one, "down_proj", of)
    # a flag that transformers 5.17 does not have yet
    return of.post_expert_norm(found) if getattr(of, "has_post_expert_norm", False) else found


def _product(x: Tensor, one: Mapping[str, Tensor], name: str, of: Any) -> Tensor:
    found = linear(x, one[name])
    return found.add_(one[f"{name}_bias"]) if of.has_bias else found
