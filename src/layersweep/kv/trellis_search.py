"""Search of the trellis codec: the symbols whose levels lie nearest to a vector, all together.

Legend: D elements, N vectors, S = 2^L states, k bits per symbol, G = 2^(L - k) groups. A state is
the last L bits of the stream; s_t = ((s_(t-1) << k) | b_t) mod S. The states g + j G differ only in
the bits that fall out next, so they share their 2^k successors (g << k) | b: one minimum over j
serves all of them. The stream is a ring, s_(-1) = s_(D-1): pass 1 runs half a turn ahead and finds
the L - k bits that go around the seam, pass 2 finds the best path that has them there.

`search` runs the compiled loops where numba works and the oracle elsewhere. Both do the same
float32 operations in the same order, so they agree bit for bit: no fused multiply-add, the lowest
index among equals.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Vectors per piece of work. 16 lanes go side by side through the loops; a piece of a few hundred
# keeps two threads evenly busy and a call's overhead (20 us) below a hundredth.
_PIECE = 512


def encoder_name() -> str:
    """What searches on the CPU: "numba" or, where that cannot serve, "torch"."""
    return "torch" if numba_refusal() else "numba"


@cache
def numba_refusal() -> str:
    """Why numba cannot search here, "" where it can.

    Installed is not enough: numba may lack its LLVM, not fit NumPy, or have its compiler turned
    off. So it searches for a few vectors once, and has to agree with the oracle.
    """
    if find_spec("numba") is None:
        return "numba is not installed"
    table = torch.tensor([0.5, -1.5, 1.0, -0.25])
    u_DN = torch.arange(34.0).reshape(2, 17).sin()
    try:
        found = _search_numba(u_DN, table, bits=1)
    except Exception as failure:  # whatever a broken installation raises: it has no common base
        return f"numba does not work: {type(failure).__name__}: {failure}"
    if not torch.equal(found, search_oracle(u_DN, table, bits=1)):
        return "numba does not work: its symbols differ from plain torch's"
    return ""


def search(u_DN: Tensor, table: Tensor, bits: int) -> Tensor:
    """u [D, N] float32 finite, table [S] float32, same device -> symbols [D, N] uint8.

    D x bits must be at least L, or a window would overlap itself.
    """
    if u_DN.device.type != "cpu" or encoder_name() == "torch":
        return search_oracle(u_DN, table, bits)
    return _search_numba(u_DN, table, bits)


def states_of(symbols_DN: Tensor, states: int, bits: int) -> Tensor:
    """Symbols [D, N] -> the states [D, N] int32 whose levels they stand for."""
    stream, window = symbols_DN.int(), states.bit_length() - 1
    state = stream.clone()
    for back in range(1, -(-window // bits)):
        state |= stream.roll(back, 0) << (back * bits)
    return state & (states - 1)


def search_oracle(u_DN: Tensor, table: Tensor, bits: int) -> Tensor:
    """`search` in plain torch, for any device. See there."""
    dim, half = u_DN.shape[0], u_DN.shape[0] // 2
    groups = len(table) >> bits
    any_group = torch.zeros(groups, u_DN.shape[1], dtype=torch.float32, device=u_DN.device)
    ahead, end = _forward(u_DN.roll(-half, 0), table, bits, any_group, None)
    overlap = _trace(ahead, end, bits, dim - half)[0] & (groups - 1)
    index = torch.arange(groups, device=u_DN.device).unsqueeze(1)
    one_group = any_group.masked_fill(index != overlap, torch.inf)
    back, end = _forward(u_DN, table, bits, one_group, overlap)
    return (_trace(back, end, bits, 0) & ((1 << bits) - 1)).to(torch.uint8)


def _forward(
    u_DN: Tensor, table: Tensor, bits: int, start_GN: Tensor, overlap: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Choices j [G, N] of every step (that of step 0 is never followed), best end state [N]."""
    choices = [torch.zeros_like(start_GN, dtype=torch.uint8)]
    cost = _after(start_GN, u_DN[0], table, bits)
    for u in u_DN[1:]:
        best, choice = _first_minimum(cost.view(1 << bits, len(start_GN), -1))
        choices.append(choice.to(torch.uint8))
        cost = _after(best, u, table, bits)
    if overlap is not None:
        state = torch.arange(len(table), device=u_DN.device).unsqueeze(1)
        cost = cost.masked_fill((state & (len(start_GN) - 1)) != overlap, torch.inf)
    return choices, _first_minimum(cost)[1]


def _after(best_GN: Tensor, u_N: Tensor, table: Tensor, bits: int) -> Tensor:
    """Costs [S, N] of the states once their level has stood for u."""
    difference = u_N - table.view(-1, 1 << bits, 1)
    return (best_GN.unsqueeze(1) + difference * difference).view(len(table), -1)


def _first_minimum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum along dimension 0 and its lowest index (torch.min promises no index among equals)."""
    best, index = rows[0], torch.zeros_like(rows[0], dtype=torch.int64)
    for j in range(1, len(rows)):
        better = rows[j] < best
        best = torch.where(better, rows[j], best)
        index.masked_fill_(better, j)
    return best, index


def _trace(choices: list[Tensor], end: Tensor, bits: int, first: int) -> Tensor:
    """States [D - first + 1 or D, N] along the best path: before step `first` (if any) and on."""
    groups, states = len(choices[0]), [end]
    for choice in reversed(choices[max(first, 1) :]):
        group = states[-1] >> bits
        states.append(group + groups * choice.gather(0, group.unsqueeze(0)).squeeze(0).long())
    return torch.stack(states[::-1])


def _search_numba(u_DN: Tensor, table: Tensor, bits: int) -> Tensor:
    from layersweep.kv.trellis_numba import search_of

    compiled = search_of(bits)
    symbols = torch.empty(u_DN.shape, dtype=torch.uint8)
    u, levels, out = u_DN.contiguous().numpy(), table.contiguous().numpy(), symbols.numpy()

    def run(start: int) -> None:
        compiled(u, levels, out, start, min(start + _PIECE, u.shape[1]))

    starts = range(0, u.shape[1], _PIECE)
    if len(starts) < 2:
        list(map(run, starts))
    else:
        list(_threads().map(run, starts))
    return symbols


@cache
def _threads() -> ThreadPoolExecutor:
    """The loops release the interpreter lock. A pool of our own: numba's needs OpenMP or TBB to
    be called from two threads at once."""
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="trellis")
