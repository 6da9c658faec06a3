"""A decoder of transformers that computes layer by layer, with weights from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layersweep.model.generic.build import base_of, build, fill_buffers, layers_of
from layersweep.model.generic.interfaces import current
from layersweep.model.generic.rehearsal import rehearse
from layersweep.model.generic.walk import AtLayer, Attention, SequenceWise, Walk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Linear = Callable[[Tensor, Tensor], Tensor]


class Decoder:
    """transformers' modules, unchanged, without weights until somebody binds some.

    `layers` says what each layer does. Raises Unsupported, see `rehearse`.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device, longest: int) -> None:
        parts = rehearse(config, longest)
        self.layers, self.tables = parts.layers, parts.tables
        self.model = build(config)
        fill_buffers(self.model, device)
        self.device = device
        self.base_name, self.base = base_of(self.model)
        self._modules = dict(self.model.named_modules())
        for index, layer in enumerate(layers_of(self.model)):
            layer.register_forward_pre_hook(_halts_at(index))
            for name in self.layers[index].mixers:
                mixer = self._modules[name]
                mixer.forward = _by_sequence(mixer.forward)
        layer.register_forward_hook(_halts_behind(len(self.layers)))

    def walk(
        self, ids: Tensor, positions: Tensor, attend: Attention, by_sequence: SequenceWise
    ) -> Walk:
        """The forward pass of rows with `ids` [N] at `positions` [N]. It takes the embedding at
        once, halts before each layer and behind the last, and then takes the rest of the base."""

        def forward() -> Tensor:
            found = self.base(input_ids=ids[None], position_ids=positions[None], use_cache=False)
            return found[0]  # type: ignore[no-any-return]

        return Walk(forward, attend, by_sequence)

    @contextmanager
    def bound(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters and buffers of the checkpoint, by their names in the model, in place."""
        taken: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name, tensor in weights.items():
                owner, _, key = name.rpartition(".")
                module = self._modules[owner]
                held = module._parameters if key in module._parameters else module._buffers
                taken.append((held, key, held[key]))
                held[key] = (
                    nn.Parameter(tensor, requires_grad=False)
                    if held is module._parameters
                    else tensor
                )
            yield
        finally:
            for held, key, before in reversed(taken):
                held[key] = before

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] float32 of what a walk came to, with the head's weights bound.

        The causal model's own forward, so that scales and caps are its own, around hidden states
        that are there already.
        """
        self.base.forward = lambda *args, **kwargs: _Output(hidden_NH[None])
        try:
            ids = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            del self.base.forward
        return found[0].float()


class _Output:
    """Hidden states, and None for all else that an output may have."""

    def __init__(self, hidden_1NH: Tensor) -> None:
        self.last_hidden_state = hidden_1NH

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _halts_at(index: int) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        current().halt(AtLayer(index))

    return hook


def _halts_behind(index: int) -> Any:
    def hook(module: nn.Module, args: Any, found: Any) -> None:
        current().halt(AtLayer(index))

    return hook


def _by_sequence(forward: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return current().by_sequence(forward, args, kwargs)

    return called
