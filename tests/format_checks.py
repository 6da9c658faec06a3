"""Kernels of the formats of other quantizers against their decoders in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from formats import FORMATS, draw_mxfp4
from kernel_checks import exactly
from test_formats import matched
from torch import Tensor

from layersweep.kernels import Kernels
from layersweep.kernels.weights import Alike

PARTS, GAP = 3, 8
NAMES = (*FORMATS, "mxfp4")


def drawn(name: str, rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], object]:
    """A weight of any bytes, and what config.json says of it."""
    rng = np.random.default_rng(seed)
    if name == "mxfp4":
        found, _ = draw_mxfp4(1, rows, columns, rng, True)
        return {f"x{end}": part[0] for end, part in found.items()}, None
    found, _ = FORMATS[name].draw(rows, columns, rng, True)
    return {f"x.{end}": part for end, part in found.items()}, FORMATS[name].settings


def check_format(
    kernels: Kernels, device: torch.device, name: str, rows: int, columns: int, seed: int
) -> None:
    """A weight alone, and with two others that lie alike."""
    arenas, packed = list[Tensor](), []
    shape = rows, columns
    for part in range(PARTS):
        tensors, config = drawn(name, rows, columns, seed + part)
        storage, problems = matched(tensors, shape, config)
        assert storage is not None, problems
        parts = [tensors[one.name].contiguous().view(torch.uint8) for one in storage.stored]
        arenas.append(_padded([one.view(-1) for one in parts]).to(device))
    arena = torch.stack(arenas)
    for own in arena:
        views, at = [], 0
        for piece in storage.pieces:
            views.append(own[at : at + piece.nbytes])
            at += -(-piece.nbytes // 256) * 256
        packed.append(storage.packed(views, shape))
    step = rows * columns + GAP
    dense = torch.full((PARTS, step), 7.0, dtype=kernels.dtype, device=device)
    alike = Alike([at * arena.stride(0) for at in range(PARTS)], [0.0] * PARTS, step)
    assert packed[0].launch_alike(kernels, dense[0, :-GAP].view(shape), alike)
    for found, one in zip(dense, packed, strict=True):
        wanted, alone = (torch.empty(shape, dtype=kernels.dtype, device=device) for _ in "ab")
        one.decode(wanted)
        one.launch(kernels, alone)
        exactly(alone, wanted, seed)
        exactly(found[:-GAP].view(shape), wanted, seed)
        assert found[-GAP:].eq(7).all()


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """As a block's arena has them: each at a multiple of 256 bytes."""
    return torch.cat([torch.nn.functional.pad(one, (0, -len(one) % 256)) for one in parts])
