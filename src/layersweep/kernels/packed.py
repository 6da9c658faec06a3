"""Kernels that attend to trellis codes where they lie; see packed.cu. They are compiled for a head
size of 64, 128 or 256, and need sm_80.

Legend: B sequences, Q query heads, G key heads, T coded tokens, D numbers of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layersweep.kernels.codecs import CodecKernels, same
from layersweep.kernels.runtime import Argument

PACKED_DIMS, PACKED_BITS = (64, 128, 256), (2, 3, 4)
CHUNK, TILE = 1024, 32  # tokens that share a maximum; that a warp takes together
MOST_EXACT = 8192  # columns, whose scores lie in shared memory
PACKED_LAYOUTS = {
    "packed": {
        **{f"packed_scores_{bits}": "16P6q3if" for bits in PACKED_BITS},
        **{f"packed_sums_{bits}_{tiles}": "8P4q4i" for bits in PACKED_BITS for tiles in (1, 2)},
        "packed_join": "13P7if",
    },
}
_THREADS, _OCTET, _TILE_HEADS = 256, 8, 16
_RESIDENT = 132  # multiprocessors of an H100: one block of packed_scores each, two of packed_sums


@dataclass(frozen=True, eq=False)
class Coded:
    """What is stored of T tokens, see kv.trellis and kv.sinks. Sequences and heads have any stride.

    codes   uint8 [B, G, T, D bits / 8]
    scales  uint8 [B, G, T], relative to `sizes` float32 [B, G]
    flags   uint8 [B, T / 8 or more]: which tokens are coded around a sink; None: no one is
    levels  float32 [256] of the code
    """

    bits: int
    codes: Tensor
    scales: Tensor
    sizes: Tensor
    flags: Tensor | None
    levels: Tensor

    def strides(self) -> list[int]:
        """Of sequences and heads: codes, then scales."""
        codes, scales = self.codes, self.scales
        assert codes.dtype == scales.dtype == torch.uint8 and codes.shape[:3] == scales.shape
        assert codes.stride(3) == scales.stride(2) == 1 and codes.stride(2) == codes.shape[3]
        alignment = min(16, codes.shape[3] & -codes.shape[3])
        assert not (codes.data_ptr() | codes.stride(0) | codes.stride(1)) % alignment
        return [codes.stride(0), codes.stride(1), scales.stride(0), scales.stride(1)]

    @property
    def flag_stride(self) -> int:
        if self.flags is None:
            return 0
        assert self.flags.dtype == torch.uint8 and self.flags.stride(1) == 1
        assert self.flags.shape[1] * 8 >= self.codes.shape[2]
        return self.flags.stride(0)


@dataclass(frozen=True, eq=False)
class Weighed:
    """What `packed_scores` found. A chunk is CHUNK tokens; scores are exponents of two.

    weights  float16 [B, Q / 8, chunks, CHUNK / 16, 32, 4], relative to the greatest of their chunk,
             in the order in which `packed_sums` reads them
    stats    float32 [B, Q, chunks, 4]: that greatest score, the sum of weights, and their sums over
             the tokens whose key, whose value is coded around a sink
    """

    weights: Tensor
    stats: Tensor

    @property
    def chunks(self) -> int:
        return self.stats.shape[2]


class PackedKernels(CodecKernels):
    """The part of `Kernels` that attends to codes. kv/packed_attention.py has the oracle and says
    what each table holds; `factors` float32 [256] are trellis_scale.scale_values."""

    def packed_scores(
        self, q: Tensor, keys: Coded, values: Coded, factors: Tensor, around: Tensor,
        matrix: Tensor, near: Tensor, turn: tuple[Tensor, Tensor], spans: Tensor, cap: float,
    ) -> Weighed:  # fmt: skip
        """q float32 [B, Q, D] in pairs, scaled: a product is a power of two, or where `cap` is not
        0 the argument of tanh, and the cap one. around float32 [B, G, 2, D], matrix int32
        [G, D / 16, D / 16, 32, 4], near int32 [TILE, D / 4, 2]; turn: cos and sin float32
        [positions, D / 2]; spans int32 [B, 2]: position of the first coded token, how many."""
        batch, heads, dim = q.shape
        groups, tokens = keys.codes.shape[1:3]
        chunks, octets = -(-tokens // CHUNK), -(-(heads // groups) // _OCTET)
        for one in (q, keys.levels, factors, keys.sizes, around, *turn):
            same(one, torch.float32)
        for one in (matrix, near, spans):
            same(one, torch.int32)
        assert around.shape == (batch, groups, 2, dim) and near.shape == (TILE, dim // 4, 2)
        assert matrix.numel() == groups * dim * dim // 2 and spans.shape == (batch, 2)
        assert turn[0].shape == turn[1].shape and turn[0].shape[1] == dim // 2
        shape = batch, -(-heads // _OCTET), chunks, CHUNK // 16, 32, 4
        weights = torch.empty(shape, dtype=torch.float16, device=q.device)
        stats = torch.empty(batch, heads, chunks, 4, device=q.device)
        args: list[Argument] = [
            keys.codes, keys.scales, keys.flags, values.flags, keys.levels, factors, keys.sizes,
            around, matrix, near, *turn, q, spans, weights, stats,
            *keys.strides(), keys.flag_stride, values.flag_stride,
            groups, heads // groups, chunks, cap,
        ]  # fmt: skip
        rows = groups * octets
        threads, shared = 256 if dim > 128 else 512, _scores_bytes(dim, keys.bits)
        grid = (_at_once(chunks, rows * batch, _RESIDENT), rows, batch)
        name = f"packed_scores_{keys.bits}"
        self._module("packed", dim).launch(name, grid, threads, args, shared)
        return Weighed(weights, stats)

    def packed_sums(
        self, coded: Coded, factors: Tensor, spans: Tensor, weighed: Weighed, every_head: bool
    ) -> Tensor:
        """float32 [B, G, parts, query heads, D]: sums of levels times scales times weights, these
        relative to the greatest score. Of the query heads of a key head, or of every one."""
        batch, heads = weighed.stats.shape[:2]
        groups = coded.codes.shape[1]
        dim = coded.codes.shape[3] * 8 // coded.bits
        each = 0 if every_head else heads // groups
        seen = each or heads
        # of 16 heads, from a multiple of 8 on; key heads whose query heads lie otherwise see some
        # of their neighbours', in vain
        most = seen + (0 if seen % _OCTET == 0 else max(g * each % _OCTET for g in range(groups)))
        tiles = min(2, -(-most // _TILE_HEADS))
        rows = -(-most // (_TILE_HEADS * tiles))
        parts = _at_once(weighed.chunks, groups * rows * batch, 2 * _RESIDENT)
        out = torch.empty(batch, groups, parts, seen, dim, device=spans.device)
        args: list[Argument] = [
            coded.codes, coded.scales, coded.levels, factors, spans, weighed.weights,
            weighed.stats, out,
            *coded.strides(), heads, each, weighed.chunks, rows,
        ]  # fmt: skip
        shared = _table_bytes(coded.bits) + 1024 + 4 * _TILE_HEADS * tiles
        name, grid = f"packed_sums_{coded.bits}_{tiles}", (parts, groups * rows, batch)
        self._module("packed", dim).launch(name, grid, _THREADS, args, shared)
        return out

    def packed_join(
        self, q: Tensor, exact: tuple[Tensor, Tensor], counts: Tensor, sinks: Tensor | None,
        weighed: Weighed, parts: tuple[Tensor, Tensor | None], sizes: tuple[Tensor, Tensor],
        offsets: Tensor, cap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """With the exact columns, keys in pairs and values T [B, G, E, D], of which each sequence
        has `counts` int32 [B]: what is complete, float32 [G, B Q / G, D], and what a product is
        still to be taken of, [G, B Q / G, (1 + G) D] or [..., D]: sums of the values' levels, then
        of each key head's. sinks float32 [Q], powers of two; parts and sizes: of values, of keys;
        offsets float32 [B, G, 4, D]."""
        (keys, values), (value_parts, key_parts) = exact, parts
        batch, heads, dim = q.shape
        groups, columns = keys.shape[1:3]
        for one in (keys, values):
            same(one, self.dtype)
        for own in (q, weighed.stats, offsets, *sizes, *(() if sinks is None else (sinks,))):
            same(own, torch.float32)
        same(counts, torch.int32)
        assert keys.shape == values.shape == (batch, groups, columns, dim) and columns <= MOST_EXACT
        assert offsets.shape == (batch, groups, 4, dim) and counts.shape == (batch,)
        rows, told = batch * heads // groups, 0 if key_parts is None else groups
        base = torch.empty(groups, rows, dim, device=q.device)
        sums = torch.empty(groups, rows, (1 + told) * dim, device=q.device)
        args: list[Argument] = [
            q, keys, values, sinks, weighed.stats, value_parts, key_parts, *sizes, offsets, counts,
            base, sums, groups, heads // groups, heads, weighed.chunks, columns,
            value_parts.shape[2], 0 if key_parts is None else key_parts.shape[2], cap,
        ]  # fmt: skip
        module = self._module("packed", dim)
        module.launch("packed_join", (heads, batch, 1), _THREADS, args, 4 * columns)
        return base, sums


def packed_refusal(device: torch.device, dim: int, bits: int) -> str | None:
    """Why `device` cannot attend to codes of `dim` numbers, keys of `bits`, or None if it can."""
    if device.type != "cuda":
        return f"kernels need a CUDA device, not {device}"
    properties: Any = torch.cuda.get_device_properties(device)
    needed, found = _scores_bytes(dim, bits), properties.shared_memory_per_block_optin
    if properties.major < 8 or found < needed:
        return (
            f"found sm_{properties.major}{properties.minor} with {found} bytes of shared memory, "
            f"needed sm_80 and {needed}"
        )
    return None


def _scores_bytes(dim: int, bits: int) -> int:
    """Shared memory of packed_scores: levels, matrix, turns, queries, scores and maxima. The matrix
    of wide heads stays in global memory, and a block has half the warps."""
    matrix = 0 if dim > 128 else 2 * dim * dim
    return matrix + _table_bytes(bits) + TILE * (2 * dim + 32) + _OCTET * 4 * (dim + CHUNK + 5)


def _table_bytes(bits: int) -> int:
    """Of the levels of each window of whole symbols, a word for each lane."""
    return 32 * 4 << -(-8 // bits) * bits


def _at_once(chunks: int, others: int, blocks: int) -> int:
    """Blocks along the chunks, each of which takes about equally many, so that there are no more
    than `blocks` with `others` beside each, if chunks are few enough."""
    each = max(1, -(-chunks * others // blocks))
    return -(-chunks // each)
