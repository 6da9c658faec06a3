"""Parts of transformers' modules that compute what a kernel of this package does, too.

They are recognized by what they make of numbers, not by their names: a part counts where a rule
written down here makes the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layersweep.families.generic.build import FOREIGN_FAILURES

GateAct = Literal["silu", "gelu", "gelu_tanh", "relu2"]

_ACTS: dict[GateAct, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
_VECTOR = 8  # elements that a kernel loads at once
_ROWS = 64
_FAINT = 1e-8  # numbers so small that a norm divides by its epsilon alone
_LARGEST = 200.0  # beyond whatever a gate is clamped to; its product is below fp16's largest


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps), rounded and times the weight; with an `offset` to the weight,
    rounded after that."""

    eps: float
    offset: float

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (y * (self.offset + weight.float())).to(x.dtype)
        return weight * y.to(x.dtype)


def rms_norms(model: nn.Module) -> dict[nn.Module, RmsNorm]:
    """The norms of a model, whose parameters may be on the meta device; each kind is asked once."""
    known: dict[Hashable, RmsNorm | None] = {}
    found = {}
    for module in model.modules():
        shapes = tuple((name, one.shape) for name, one in module.named_parameters())
        settings = tuple(one for one in vars(module).items() if isinstance(one[1], int | float))
        kind = type(module), shapes, settings
        if kind not in known:
            known[kind] = rms_norm_of(module)
        if norm := known[kind]:
            found[module] = norm
    return found


def rms_norm_of(module: nn.Module) -> RmsNorm | None:
    """The norm that a module is, if it is one."""
    own = dict(module.named_parameters())
    only = own.get("weight")
    if len(own) > 1 or only is None or only.ndim != 1 or dict(module.named_buffers()):
        return None
    x = _numbers((_ROWS, len(only)), 1.0) * torch.logspace(-3, 2, _ROWS)[:, None]
    weight = 1 + _numbers(only.shape, 0.5)
    try:
        faint = _asked(module, torch.full_like(x, _FAINT), torch.ones_like(weight))
        if not (faint.shape == x.shape and bool((faint > 0).all())):
            return None
        for offset in (0.0, 1.0):
            scale = (1 + offset) * _FAINT / float(faint[0, 0])
            norm = RmsNorm(float(f"{scale**2 - _FAINT**2:.5g}"), offset)
            if _makes_the_same(module, norm, x.bfloat16(), weight.bfloat16()):
                return norm
    except FOREIGN_FAILURES:  # it takes more than rows
        pass
    return None


def gate_of(experts: Any, dtype: torch.dtype, inner: int) -> GateAct | None:
    """How experts come from gate and up, the two halves of their rows, to act(gate) * up, `inner`
    wide; None where they do something else, or where a kernel's vectors do not fit the rows."""
    if not experts.has_gate or inner % _VECTOR:
        return None
    near, far = _numbers((_ROWS, 32), 1.0), _numbers((_ROWS, 32), _LARGEST / 3)
    x = torch.cat((near, far.clamp(-_LARGEST, _LARGEST))).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    try:
        found = experts._apply_gate(x.clone())
    except FOREIGN_FAILURES:
        return None
    return next((name for name, act in _ACTS.items() if torch.equal(act(gate) * up, found)), None)


def _makes_the_same(module: nn.Module, norm: RmsNorm, x: Tensor, weight: Tensor) -> bool:
    return torch.equal(_asked(module, x, weight), norm(x, weight))


def _asked(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What it makes of x with this weight in place of its own."""
    own = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        found: Tensor = type(module).forward(module, x)
    finally:
        module._parameters["weight"] = own
    return found


def _numbers(shape: tuple[int, ...], spread: float) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
