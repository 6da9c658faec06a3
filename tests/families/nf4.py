"""transformers' model as `--weights nf4` has it, by the codec of the tests' own builders."""

from __future__ import annotations

import copy

import torch
from checkpoint_builders import pack, unpack
from torch import Tensor, nn
from transformers import PreTrainedModel

# of linear layers: what is small and decides where a token goes
ROUTERS = ("router", "gate", "shared_expert_gate")


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the linear layers and the experts of its decoder layers in NF4 (blocks of 64,
    plain absmax)."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            parts = name.split(".")
            if not any(part.isdigit() for part in parts) or set(parts) & set(ROUTERS):
                continue
            for key, matrix in module.named_parameters(recurse=False):
                if isinstance(module, nn.Linear) and key == "weight":
                    matrix.copy_(_rounded(matrix))
                elif matrix.ndim == 3 and key.endswith("_proj"):  # experts, one after the other
                    turned = getattr(module, "is_transposed", False)
                    matrix.copy_(_rounded(matrix.mT).mT if turned else _rounded(matrix))
    return model


def _rounded(matrix: Tensor) -> Tensor:
    """Blocks run along what a row is multiplied by."""
    packed = pack("weight", matrix.reshape(-1, matrix.shape[-1]), nested=False)
    return unpack("weight", packed).view(matrix.shape)
