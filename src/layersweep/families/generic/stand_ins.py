"""A model that computes without its weights: small stand-ins for every matrix.

What a rehearsal asks (who is called, with what; who mixes tokens; how keys turn) does not depend
on weights, and a layer of a large model has gigabytes of them.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Larger parameters get one number in all places.
_LARGE = 2**20


class StandIns:
    """Replaces the weights of a model on the meta device, in float32.

    A matrix becomes the sum of a fixed row and a multiple of another, which the input decides; not
    with `same`, where all rows come out alike, so that only positions tell them apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.same = False
        self._pool: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        for name, module in model.named_modules():
            size = _sizes(module)
            if size is not None:
                module.forward = _Matrix(self, name, *size)
            elif type(module).forward is nn.Embedding.forward:
                module.forward = _Table(self, name, module.embedding_dim)
            # also of matrices: some modules take them and multiply themselves
            for key, parameter in module.named_parameters(recurse=False):
                module._parameters[key] = nn.Parameter(self._small(parameter), False)
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    module._buffers[key] = self._small(buffer)

    def _small(self, like: Tensor) -> Tensor:
        """Positive numbers around 1 / 2; the same for all of one shape."""
        dtype = torch.float32 if like.is_floating_point() else like.dtype
        key = like.shape, dtype
        if key not in self._pool:
            if not like.is_floating_point():
                self._pool[key] = torch.zeros(like.shape, dtype=dtype)
            elif like.numel() > _LARGE:
                self._pool[key] = torch.full((), 0.01, dtype=dtype).expand(like.shape)
            else:
                self._pool[key] = 0.25 + 0.5 * torch.rand(
                    like.shape, dtype=dtype, generator=_seeded(str(tuple(like.shape)))
                )
        return self._pool[key]


class _Matrix:
    def __init__(self, all_of: StandIns, name: str, inputs: int, outputs: int) -> None:
        seed = _seeded(name)
        self._of = all_of
        self._look = torch.randn(inputs, dtype=torch.float32, generator=seed) / inputs**0.5
        self._base, self._step = torch.randn(2, outputs, dtype=torch.float32, generator=seed)

    def __call__(self, x: Tensor) -> Tensor:
        much = x.float() @ self._look
        much = torch.zeros_like(much) if self._of.same else much
        found: Tensor = self._base + much[..., None] * self._step
        return found


class _Table:
    def __init__(self, all_of: StandIns, name: str, width: int) -> None:
        self._of, self._width, self._name = all_of, width, name
        self._base, self._step = torch.randn(2, width, dtype=torch.float32, generator=_seeded(name))

    def __call__(self, ids: Tensor) -> Tensor:
        much = torch.zeros(ids.shape) if self._of.same else torch.sin(3.0 * ids)
        found: Tensor = self._base + much.float()[..., None] * self._step
        return found


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of what is a plain matrix."""
    from transformers.pytorch_utils import Conv1D

    if type(module).forward is nn.Linear.forward:
        return module.in_features, module.out_features  # type: ignore[return-value]
    if type(module).forward is Conv1D.forward:
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
