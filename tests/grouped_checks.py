"""Grouped products in Triton against a product per expert, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from kernel_checks import draw, exactly
from torch import Tensor

from layersweep.model.ops import Parts, TorchOps

Span = tuple[int, int]


def slots(seed: int, parts: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[parts, *shape], with 24 numbers that are nobody's between one part and the next."""
    each = torch.Size(shape).numel()
    drawn = draw(seed, parts, each + 24, device=device).to(dtype)
    return drawn[:, :each].unflatten(1, shape)


def products(
    x: Tensor, weights: Tensor, biases: Tensor | None, rows: Sequence[int], counted_from: int = 0,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from layersweep.kernels.grouped_triton import grouped_products

    ends = torch.tensor(rows).cumsum(0)
    spans = list(pairwise([0, *ends.tolist()]))
    size = spans[-1][1], weights.shape[1]
    out = torch.full(size, float("nan"), dtype=x.dtype, device=x.device)
    on_device = (ends + counted_from).to(x.device)
    grouped_products(x, index, weights, biases, spans, on_device, out)
    return out


def check_grouped(
    device: torch.device,
    dtype: torch.dtype,
    rows: Sequence[int],
    width: int,
    depth: int,
    seed: int,
    biased: bool,
) -> None:
    """Within a rounding of the loop in float32; rows of x have numbers of others between them."""
    x = draw(seed, sum(rows), 2 * depth, device=device).to(dtype)[:, :depth]
    made = {"dtype": dtype, "device": device}
    weights = slots(seed + 1, len(rows), width, depth, **made)
    biases = slots(seed + 2, len(rows), width, **made) if biased else None
    found = products(x, weights, biases, rows, counted_from=1000)
    parts = Parts(list(pairwise([0, *torch.tensor(rows).cumsum(0).tolist()])))
    wanted = TorchOps().products(
        x.float(), weights.float(), None if biases is None else biases.float(), parts,
        torch.empty(found.shape, device=device),
    )  # fmt: skip
    # half a step of the result's own size, and the order of a float32 sum around zero
    close = torch.finfo(dtype).eps * wanted.abs() + 5e-5 * depth**0.5
    assert found.dtype == dtype and bool(((found.float() - wanted).abs() <= close).all()), seed


def check_rows_are_their_own(device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """A row of one part has the same bits alone, elsewhere, and with other parts of any size."""
    depth, width = 200, 136
    weights = slots(seed, 3, width, depth, dtype=dtype, device=device)
    x = draw(seed + 1, 500, depth, device=device).to(dtype)
    whole = products(x, weights, None, (17, 300, 183))
    exactly(products(x[17:317], weights[1:2], None, (300,)), whole[17:317], seed)
    exactly(products(x[20:317], weights, None, (0, 297, 0)), whole[20:317], seed)
    for row in (17, 145, 316):
        exactly(products(x[row : row + 1], weights, None, (0, 1, 0)), whole[row : row + 1], seed)
    moved = torch.cat([x[400:], x[17:317], x[:30]])
    exactly(products(moved, weights, None, (100, 300, 30))[100:400], whole[17:317], seed)


def check_gathered_rows(
    device: torch.device, dtype: torch.dtype, rows: Sequence[int], width: int, depth: int, seed: int
) -> None:
    """A row has the same bits where the kernel finds it by an index, from any place on, as where it
    lies beside the others of its part. Some are asked for twice, some never."""
    count = sum(rows)
    x = draw(seed, count + 40, 2 * depth, device=device).to(dtype)[:, :depth]
    weights = slots(seed + 1, len(rows), width, depth, dtype=dtype, device=device)
    biases = slots(seed + 2, len(rows), width, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(count + 40, (count + 1,), generator=generator).to(device)[1:]
    wanted = products(x[index], weights, biases, rows)
    exactly(products(x, weights, biases, rows, index=index), wanted, seed)
