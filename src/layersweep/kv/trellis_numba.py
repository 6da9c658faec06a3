"""The compiled search of the trellis codec: 16 vectors side by side, one lane each.

Legend: D elements, N vectors, S states, G = S / 2^bits groups, W lanes; see trellis_search, whose
oracle does the same operations in the same order.

The inner step is written as vector instructions of LLVM, which turns them into one AVX-512 register
of floats, two of AVX2 or four of SSE and NEON. Left to LLVM's own vectorizer the same loops are ten
times slower (measured: 120 us instead of 11 for 16 vectors of 64 at 2^8 states), because it guards
every row of 16 against overlapping arrays. Nothing here permits a fused multiply-add.

Importing this imports numba; trellis_search does so at the first search. Compiled code is cached
beside this file, in the user's cache folder where that is not writable, or nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_INT64, _INT32 = ir.IntType(64), ir.IntType(32)

Search = Callable[[Any, Any, Any, int, int], None]


@intrinsic(prefer_literal=True)
def _step_of_group(typing_context, cost, after, choice, u, table, group, bits):
    """One step of the search for group g and all lanes, float32, in these very operations:

        m        = min over j of cost[g + j G], choice[g] = the lowest such j
        after[s] = m + (u - table[s])^2         for the successors s = (g << bits) | b

    cost, after [S, W] float32, choice [G, W] uint8, u [W] float32, table [S] float32, `bits` a
    literal: both loops are unrolled.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    symbols = 1 << bits.literal_value

    def write(context, builder, signature, arguments):
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:5], arguments[:5], strict=True)
        ]
        count = builder.extract_value(arrays[2].shape, 0)  # G
        _Step(builder, [array.data for array in arrays], arguments[5], count).write(symbols)
        return context.get_dummy_value()

    return types.void(cost, after, choice, u, table, group, bits), write


class _Step:
    """Writes the instructions of `_step_of_group`: `pointers` to its arrays, g, G as LLVM values.

    Rows of 16 floats are read and written unaligned: numpy promises 16 bytes, not 64.
    """

    def __init__(self, builder: Any, pointers: list[Any], group: Any, groups: Any) -> None:
        self.builder, self.group, self.groups = builder, group, groups
        self.cost, self.after, self.choice, self.u, self.table = pointers

    def write(self, symbols: int) -> None:
        build = self.builder
        best = build.load(self._row(self.cost, self.group, _FLOATS), align=4)
        choice = ir.Constant(_BYTES, [0] * LANES)
        state = self.group
        for j in range(1, symbols):
            state = build.add(state, self.groups)
            value = build.load(self._row(self.cost, state, _FLOATS), align=4)
            less = build.fcmp_ordered("<", value, best)
            best = build.select(less, value, best)
            choice = build.select(less, ir.Constant(_BYTES, [j] * LANES), choice)
        build.store(choice, self._row(self.choice, self.group, _BYTES), align=1)
        u = build.load(self._row(self.u, ir.Constant(_INT64, 0), _FLOATS), align=4)
        first = build.mul(self.group, ir.Constant(_INT64, symbols))
        for b in range(symbols):
            state = build.add(first, ir.Constant(_INT64, b))
            difference = build.fsub(u, self._all_lanes(build.load(build.gep(self.table, [state]))))
            cost = build.fadd(best, build.fmul(difference, difference))
            build.store(cost, self._row(self.after, state, _FLOATS), align=4)

    def _row(self, pointer: Any, row: Any, kind: Any) -> Any:
        start = self.builder.mul(row, ir.Constant(_INT64, LANES))
        return self.builder.bitcast(self.builder.gep(pointer, [start]), kind.as_pointer())

    def _all_lanes(self, number: Any) -> Any:
        empty = ir.Constant(_FLOATS, ir.Undefined)
        one = self.builder.insert_element(empty, number, ir.Constant(_INT32, 0))
        zeros = ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, empty, zeros)


@njit(nogil=True)
def _best_state(cost, state):
    """Into state [W]: index of the lowest cost [S, W], the lowest index among equals."""
    for lane in range(LANES):
        best = cost[0, lane]
        state[lane] = 0
        for s in range(1, cost.shape[0]):
            if cost[s, lane] < best:
                best = cost[s, lane]
                state[lane] = s


@cache
def search_of(bits: int) -> Search:
    """The search for symbols of `bits`: search(u, table, out, start, stop), without the lock.

    u [D, N] float32 contiguous, table [S] float32, out [D, N] uint8: columns start to stop.
    """
    try:
        return _compiled(bits, on_disk=True)
    except (RuntimeError, OSError):  # no folder for numba's cache, or it cannot be written
        return _compiled(bits, on_disk=False)


def _compiled(bits: int, *, on_disk: bool) -> Search:
    @njit(nogil=True, cache=on_disk)
    def search(u, table, out, start, stop):
        dim, groups = u.shape[0], table.shape[0] >> bits
        half = dim // 2
        lanes_u = np.zeros((dim, LANES), np.float32)
        cost = np.empty((2, table.shape[0], LANES), np.float32)
        choice = np.empty((dim + 1, groups, LANES), np.uint8)
        state = np.empty(LANES, np.int64)
        for first in range(start, stop, LANES):
            used = min(LANES, stop - first)
            for t in range(dim):
                for lane in range(used):
                    lanes_u[t, lane] = u[t, first + lane]
            # Pass 1, half a turn ahead: which bits go around the seam?
            cost[0] = 0
            for t in range(dim):
                row = t + half if t + half < dim else t + half - dim
                for g in range(groups):
                    _step_of_group(
                        cost[t & 1], cost[1 - (t & 1)], choice[t], lanes_u[row], table, g, bits
                    )
            _best_state(cost[dim & 1], state)
            for t in range(dim - 1, dim - half - 1, -1):
                for lane in range(LANES):
                    group = state[lane] >> bits
                    state[lane] = group + groups * choice[t, group, lane]
            # Pass 2, with those bits there.
            cost[0] = np.inf
            for lane in range(LANES):
                overlap = state[lane] & (groups - 1)
                for s in range(overlap, table.shape[0], groups):
                    cost[0, s, lane] = 0
            # One step more than elements: the last end state is the choice of the overlap's group.
            for lane in range(LANES):
                state[lane] = (state[lane] & (groups - 1)) << bits
            for t in range(dim + 1):
                row = t if t < dim else 0
                for g in range(groups):
                    _step_of_group(
                        cost[t & 1], cost[1 - (t & 1)], choice[t], lanes_u[row], table, g, bits
                    )
            for t in range(dim, 0, -1):
                for lane in range(LANES):
                    group = state[lane] >> bits
                    state[lane] = group + groups * choice[t, group, lane]
                for lane in range(used):
                    out[t - 1, first + lane] = state[lane] & ((1 << bits) - 1)

    nothing = np.empty((0, 0), np.float32)
    search(nothing, np.empty(0, np.float32), np.empty((0, 0), np.uint8), 0, 0)  # compiles it
    compiled: Search = search
    return compiled
