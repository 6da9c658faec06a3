"""Weights of other quantizers, found by their tensors; kernels against decoders in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from formats import FORMATS, draw_mxfp4
from kernel_checks import exactly
from torch import Tensor

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import Headers, Storage, formats_of, read_settings
from layersweep.kernels import Kernels
from layersweep.kernels.weights import Alike

DTYPE_NAMES = {
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
}  # fmt: skip


def matched(
    tensors: dict[str, Tensor], shape: tuple[int, ...], config: object = None
) -> tuple[Storage | None, list[str]]:
    """How the only weight of some tensors is stored, or what is wrong with it."""
    stored = {
        name: StoredTensor(name, Path("f"), DTYPE_NAMES[one.dtype], tuple(one.shape), 0, one.nbytes)
        for name, one in tensors.items()
    }
    stated, refused = read_settings({"quantization_config": config}, "config.json")
    headers = Headers(stored, None, refused, {}, stated)
    base = next(name for name in ("x.weight", "x_blocks") if name in formats_of(stored))
    found = formats_of(stored)[base].match(headers, base, shape)
    return found, [one.sentence() for one in headers.problems]


def parts_of(storage: Storage, tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[one.name].contiguous().view(-1).view(torch.uint8) for one in storage.stored]


def decoded(
    storage: Storage, parts: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    out = torch.full(shape, 7.0, dtype=dtype)
    storage.packed(parts, shape).decode(out)
    return out


# --- kernels -------------------------------------------------------------------------------------

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
