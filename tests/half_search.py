"""The search of kernels/trellis.cu in plain torch: half numbers, every operation rounded once.

Legend: kv/trellis_search.py, whose search in float32 finds codes of the same error. The seam is
found from both sides: ways that end there and ways that begin there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.kv.trellis_search import _first_minimum, _trace


def half_search(u_DN: Tensor, table: Tensor, bits: int) -> Tensor:
    """u [D, N] float32, table [S] float32, same device -> symbols [D, N] uint8. 8 divides D."""
    u, levels = u_DN.half(), table.half()
    half, groups = len(u) // 2, len(table) >> bits
    zeros = torch.zeros(len(table), u.shape[1], dtype=torch.float16, device=u.device)
    # Against the stream's order, mirrored states follow each other as states do along it.
    back, _ = _walk(zeros, u[:half].flip(0), levels[_mirrored(len(table), u.device)], bits)
    ahead, _ = _walk(zeros, u[half:], levels, bits)
    from_seam, to_seam = (costs.view(1 << bits, groups, -1).amin(0) for costs in (back, ahead))
    overlap = _first_minimum(to_seam + from_seam[_mirrored(groups, u.device)])[1]
    elsewhere = (torch.arange(len(table), device=u.device).unsqueeze(1) & (groups - 1)) != overlap
    costs, choices = _walk(zeros.masked_fill(elsewhere, torch.inf), u, levels, bits)
    end = _first_minimum(costs.masked_fill(elsewhere, torch.inf))[1]
    return (_trace(choices, end, bits, 0) & ((1 << bits) - 1)).to(torch.uint8)


def _mirrored(count: int, device: torch.device) -> Tensor:
    """0 to count - 1, a power of 2, with their bits in the opposite order."""
    found = torch.zeros(1, dtype=torch.int64, device=device)
    while len(found) < count:
        found = torch.cat((2 * found, 2 * found + 1))
    return found


def _walk(costs: Tensor, u: Tensor, levels: Tensor, bits: int) -> tuple[Tensor, list[Tensor]]:
    """Costs [S, N] after the elements u [D, N], choices [G, N] of every step."""
    choices, floor = [], costs[0]
    for at, one in enumerate(u):
        least, choice = _first_minimum(costs.view(1 << bits, len(levels) >> bits, -1))
        choices.append(choice.to(torch.uint8))
        if at % 4 == 0:
            floor = least.amin(0)
        if at % 4 == 2:
            least = least - floor
        gap = one - levels.view(-1, 1 << bits, 1)
        costs = _fused(gap, least.unsqueeze(1)).view(len(levels), -1)
    return costs, choices


def _fused(gap: Tensor, add: Tensor) -> Tensor:
    """gap * gap + add, rounded once: float32 in between rounds to odd."""
    exact = gap.double().square() + add.double()
    near = exact.float()
    bits = near.view(torch.int32)
    even = (near.double() != exact) & (bits & 1 == 0)
    odd = torch.where(near.double() < exact, bits + 1, bits - 1).view(torch.float32)
    return torch.where(even, odd, near).half()
