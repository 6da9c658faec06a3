"""A decoder of transformers that computes layer by layer, with weights from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layersweep.families.generic.alike import RmsNorm, rms_norms
from layersweep.families.generic.build import base_of, build, config_of, fill_buffers, layers_of
from layersweep.families.generic.interfaces import current
from layersweep.families.generic.parts import GenericParts
from layersweep.model.compute import Compute
from layersweep.model.generic.walk import AtLayer, Rows, Walk
from layersweep.model.ops import CudaOps, TorchOps

Product = Callable[[Tensor, Tensor], Tensor]  # x [N, H], weight [V, H] -> [N, V]


class Modules:
    """transformers' modules, without weights until somebody binds some; the first `count` layers of
    them. They are unchanged, but that kernels take the place of norms that they equal."""

    def __init__(self, parts: GenericParts, count: int, compute: Compute) -> None:
        device = compute.device
        self.layers = parts.layers[:count]
        self.model = build(config_of(json.loads(parts.config)))
        fill_buffers(self.model, device)
        self.device = device
        _, self._base = base_of(self.model)
        decoder = self.model.get_decoder()
        self._bases = {self._base} if decoder is self.model else {self._base, decoder}
        layers = layers_of(self.model)
        self._by_name = dict(self.model.named_modules())
        self._parameters = frozenset(self.model.state_dict())
        del layers[count:]
        for index, (layer, known) in enumerate(zip(layers, self.layers, strict=True)):
            layer.register_forward_pre_hook(_halts_at(index), with_kwargs=True)
            self._called(known.mixers, lambda rows: rows.by_sequence)
            self._called(known.rowwise, lambda rows: rows.by_row)
            if known.attends_in:
                self._called((known.attends_in,), lambda rows: rows.by_group)
        layers[-1].register_forward_hook(_halts_behind(count))
        after = {self.parameter(key).rpartition(".")[0] for key in parts.blocks[-1].weights}
        base = {
            name for name, module in self._by_name.items() if module in set(self._base.modules())
        }
        self._called(tuple(after & base), lambda rows: rows.by_row)
        if isinstance(compute.ops, CudaOps):
            norm_by(compute.ops, compute.dtype, self.model)

    def _called(self, names: tuple[str, ...], how: Callable[[Rows], Any]) -> None:
        for name in names:
            module = self._by_name[name]
            module.forward = _calling(module.forward, how)

    @cached_property
    def layer_of(self) -> dict[nn.Module, int]:
        """Which layer a module attends in."""
        attending = ((index, layer.attention) for index, layer in enumerate(self.layers))
        return {self.module(name): index for index, name in attending if name}

    def parameter(self, name: str) -> str:
        """Its whole name, of one in a block."""
        return name if name in self._parameters else f"{name}.weight"

    def module(self, name: str) -> nn.Module:
        found: nn.Module = self._by_name[name]
        return found

    def walk(self, ids: Tensor, positions: Tensor, rows: Rows) -> Walk:
        """The forward pass of rows with `ids` [N] at `positions` [N]. It takes the embedding at
        once, halts before each layer and behind the last, and then takes the rest of the base."""

        def forward() -> Tensor:
            found = self._base(input_ids=ids[None], position_ids=positions[None], use_cache=False)
            return found[0]  # type: ignore[no-any-return]

        return Walk(forward, rows, self.device)

    @contextmanager
    def bound(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters and buffers of the checkpoint, by their names in the model, in place."""
        taken: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, tensor in weights.items():
                owner, _, key = name.rpartition(".")
                module = self._by_name[owner]
                held = module._parameters if key in module._parameters else module._buffers
                taken.append((held, key, held[key]))
                parameter = held is module._parameters
                held[key] = nn.Parameter(tensor, requires_grad=False) if parameter else tensor
            yield
        finally:
            for held, key, before in reversed(taken):
                held[key] = before

    def logits(self, hidden_NH: Tensor, product: Product) -> Tensor:
        """Logits [N, V] float32 of what a walk came to, with the head's weights bound.

        The causal model's own forward, so that scales and caps are its own, around hidden states
        that are there already. `product` takes the place of the last matrix.
        """
        head: Any = self.model.get_output_embeddings()
        for base in self._bases:
            base.forward = lambda *args, **kwargs: _Output(hidden_NH[None])
        if head is not None and type(head).forward is nn.Linear.forward:
            head.forward = lambda x: _plus(product(x[0], head.weight), head.bias)[None]
        try:
            ids = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for module in (*self._bases, *([head] if head is not None else [])):
                module.__dict__.pop("forward", None)
        return found[0].float()


def norm_by(ops: TorchOps, dtype: torch.dtype, model: nn.Module) -> None:
    """RMS norms of a model in one pass over all their rows, where torch takes eight, in float32.
    What is not of the `dtype` of these operations stays theirs."""
    for module, norm in rms_norms(model).items():
        module.forward = _norming(ops, dtype, norm, module, module.forward)


def _norming(
    ops: TorchOps, dtype: torch.dtype, norm: RmsNorm, module: nn.Module,
    forward: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """`forward` stays for what the kernel cannot take."""

    def normed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight: Any = module.weight
        heads_first = x.ndim == 4 and not x.is_contiguous()  # [1, heads, N, D], a view of rows
        dense = x.transpose(1, 2) if heads_first else x
        aligned = len(weight) % 8 == 0 and (x.data_ptr() | weight.data_ptr()) % 16 == 0
        ours = aligned and dense.is_contiguous() and x.dtype == weight.dtype == dtype
        if args or kwargs or not ours:
            return forward(x, *args, **kwargs)
        rows = dense.view(-1, len(weight))
        found = ops.rms_norm(rows, weight, norm.eps, torch.empty_like(rows), offset=norm.offset)
        found = found.view(dense.shape)
        return found.transpose(1, 2) if heads_first else found

    return normed


class _Output:
    """Hidden states, and None for all else that an output may have."""

    def __init__(self, hidden_1NH: Tensor) -> None:
        self.last_hidden_state = hidden_1NH

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x.add_(bias)


def _rows(hidden: Tensor) -> Tensor:
    """[N, H] of [1, N, H]; [N, C H] where a model carries C of them from layer to layer."""
    return hidden.movedim(-2, 0).flatten(1)


def _halts_at(index: int) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        current().halt(AtLayer(index, _rows(hidden)))

    return hook


def _halts_behind(index: int) -> Any:
    def hook(module: nn.Module, args: Any, found: Any) -> None:
        hidden = found if isinstance(found, Tensor) else found[0]
        current().halt(AtLayer(index, _rows(hidden)))

    return hook


def _calling(forward: Callable[..., Any], how: Callable[[Rows], Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return how(current().rows)(forward, args, kwargs)

    return called
