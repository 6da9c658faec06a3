"""Random weights under which every tensor of a model matters.

transformers initializes norms to one, biases, sinks and correction biases to zero, and matrices so
small that each token is as likely as any other: a model of such weights hides most mistakes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GAIN = 1.3  # of matrices: attention looks at few tokens, routers decide
PEAK = 3.0  # standard deviation of logits: the loss of random tokens is near ln V + 4.5
SPREAD = 0.3  # around their initial values: norms (0 or 1), biases, correction biases


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw all that state_dict() holds anew, buffers too."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in done or not tensor.is_floating_point():
                continue
            done.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator)
            if head is not None and tensor is head.weight:
                tensor.copy_(noise * (PEAK / math.sqrt(tensor.shape[-1])))
            elif id(tensor) in tables:
                tensor.copy_(noise)
            elif "sink" in name:  # attention gives them as much as a key that it looks for
                tensor.copy_(2 + noise)
            elif tensor.ndim <= 1 or "norm" in name:
                tensor.add_(SPREAD * noise)
            else:
                tensor.copy_(noise * (GAIN / math.sqrt(_fan_in(tensor))))
            assert tensor.isfinite().all(), name


def _fan_in(matrix: Tensor) -> int:
    """Of a matrix, of stacked ones, or of a convolution over time ([channels, 1, width])."""
    return matrix.shape[-1]
