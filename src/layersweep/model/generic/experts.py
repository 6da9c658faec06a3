"""Experts of a module: its own gate and activation between two products.

A module with many experts keeps their matrices as one [E, ...] parameter each. Only a few experts'
parts are ever dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from layersweep.families.generic.alike import GateAct
from layersweep.model.ops import Parts, TorchOps


def expert_rows(
    module: nn.Module,
    act: GateAct | None,
    weights: Mapping[str, Tensor],
    x_NH: Tensor,
    rows: Tensor,
    parts: Parts,
    ops: TorchOps,
    take: Callable[..., Tensor],
) -> Tensor:
    """What experts make of their rows, the `parts` of x[rows]. `weights`: their parts
    [experts, ...] of the module's parameters, by their names. `act`: see gate_of. `take` gives
    memory.

    The layout flags are those of transformers.integrations.moe.use_experts_implementation.
    """
    of: Any = module
    name = "gate_up_proj" if of.has_gate else "up_proj"
    inner = _products(x_NH, rows, name, weights, parts, ops, of, take)
    if act:
        inner = ops.swiglu_(inner, act)
    else:
        inner = of._apply_gate(inner) if of.has_gate else of.act_fn(inner)
    found = _products(inner, None, "down_proj", weights, parts, ops, of, take)
    # a flag that transformers 5.17 does not have yet
    return of.post_expert_norm(found) if getattr(of, "has_post_expert_norm", False) else found


def _products(
    x: Tensor, rows: Tensor | None, name: str, weights: Mapping[str, Tensor], parts: Parts,
    ops: TorchOps, of: Any, take: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    own, biases = weights[name], weights[f"{name}_bias"] if of.has_bias else None
    out = take(parts.spans[-1][1], own.shape[1])
    return ops.products(x, own, biases, parts, out, rows)
