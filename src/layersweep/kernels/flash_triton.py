"""Flash attention by every rule that decoders have, over one part or two, in Triton (sm_80 on).

Its oracle is model.attention.PlainAttention. Scores are never written: each program keeps a running
maximum and sum per query (Dao, 2023, arXiv:2307.08691). A program's sums are its own, in one order,
whatever other sequences share its launch. Importing this file imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from subprocess import CalledProcessError

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from layersweep.kernels.launch_triton import Launcher, has_big_shared
from layersweep.kernels.nvrtc import KernelError

LOG2_E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)  # of running maxima: finite, so that exp2(-inf - maximum) is 0
WIDE = tl.constexpr(8)  # numbers of 16 bits that are loaded at once: strides are multiples of it

Pair = tuple[Tensor, Tensor]  # keys [B, G, S, D], values [B, G, S, D of a value]
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides and dtype


@dataclass(frozen=True)
class Tile:
    """What a program computes at once. `rows`: queries times the heads that share a key head;
    `descriptors`: the copy engine loads keys and values (TMA, sm_90)."""

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False


TILE = Tile(64, 64, 4, 3, descriptors=True)
WIDE_TILE = Tile(64, 32, 4, 2, descriptors=True)


def attend(
    q_BQTD: Tensor,
    own: Pair,
    past: Pair | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    mask_TS: Tensor | None = None,
    sinks_Q: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """[B, Q, T, D of a value] in q's dtype, float16 or bfloat16, summed in float32; written to
    `out` where that is given: at a multiple of 16 bytes, strides multiples of 8, the last one 1.

    Keys and values of `past` come before `own`, wherever they lie. Query T - 1 sits at the last key
    and sees the newest `window` keys up to itself; with a mask (True: may look; no past) what that
    says. Each query must see a key. Head sizes are multiples of 8; what cannot be loaded 8 numbers
    at once from where it lies is copied.
    """
    q, k, v, *before = map(_loadable, (q_BQTD, *own, *(past or ())))
    if out is None:
        batch, heads, queries, _ = q.shape
        out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    assert not out.data_ptr() & 15
    mask = None if mask_TS is None else mask_TS.contiguous().view(torch.uint8)
    plan = _plan(
        tuple((x.shape, x.stride(), x.dtype) for x in (q, out, k, v, *before)),
        None if mask is None else mask.shape, None if sinks_Q is None else sinks_Q.dtype,
        scale, softcap, window, tile, q.device,
    )  # fmt: skip
    sources = k, v, *(before or (None, None))
    if plan.blocks:
        sources = *map(_described, (k, v, *before), plan.blocks), *sources[len(plan.blocks) :]
    args = q, *sources, out, mask, sinks_Q, *plan.numbers
    _launch(plan.grid, args, plan.key, warps=plan.tile.warps, stages=plan.tile.stages)
    return out


@dataclass(frozen=True)
class Plan:
    """What follows from shapes, strides and the rule: the host works it out once for all layers
    and groups that agree in them. `numbers`: arguments behind the tensors; `key`: of the compiled
    kernel; `blocks`: shape, strides and block of each tensor that the copy engine loads."""

    tile: Tile
    grid: tuple[int, int, int]
    numbers: tuple[int | float | bool, ...]
    key: tuple[object, ...]
    blocks: tuple[tuple[list[int], list[int], list[int]], ...]


@lru_cache(maxsize=1024)  # each shape of a group has a few for each kind of layer
def _plan(
    layouts: tuple[Layout, ...], mask: torch.Size | None, sinks: torch.dtype | None,
    scale: float, softcap: float | None, window: int | None, tile: Tile | None,
    device: torch.device,
) -> Plan:  # fmt: skip
    """`layouts`: of queries, result, keys and values, and those of a past."""
    shapes, strides, dtypes = zip(*layouts, strict=True)
    batch, heads, queries, dim = shapes[0]
    (_, groups, keys, _), width, dtype = shapes[2], shapes[3][3], dtypes[0]
    past = len(layouts) > 4
    before = shapes[4][2] if past else 0
    assert dtype in (torch.float16, torch.bfloat16) and max(dim, width) <= 256
    assert set(dtypes) == {dtype} and shapes[1] == (batch, heads, queries, width)
    assert all(one == 1 and not (a | b | c) & 7 for a, b, c, one in strides)
    assert queries <= keys and scale > 0 and dim % 8 == width % 8 == 0
    assert mask is None or (window is None and not past and mask == (queries, keys))
    block_dim, block_width = (max(16, triton.next_power_of_2(size)) for size in (dim, width))
    tile = tile or _tile(max(block_dim, block_width), device)
    factor, cap = scale * LOG2_E, 0.0
    if softcap is not None:
        factor, cap = 2 * factor / softcap, softcap * LOG2_E
    steps = [step // 8 for of in strides for step in of[:3]]
    steps += [0] * (18 - len(steps))  # of a past that is none
    fixed = (
        groups, heads // groups, dim, width, block_dim, block_width, tile.rows, tile.keys,
        past, window is not None, softcap is not None, tile.descriptors,
    )  # fmt: skip
    loaded = zip(shapes[2:], strides[2:], (block_dim, block_width) * (1 + past), strict=True)
    blocks = [(list(shape), list(of), [1, 1, tile.keys, block]) for shape, of, block in loaded]
    return Plan(
        tile,
        grid=(triton.cdiv(queries * (heads // groups), tile.rows), batch * groups, 1),
        numbers=(*steps, queries, keys, before, window or 0, factor, cap, *fixed),
        key=(device, dtype, mask is None, sinks, *fixed),
        blocks=tuple(blocks) if tile.descriptors else (),
    )


def _described(x: Tensor, block: tuple[list[int], list[int], list[int]]) -> TensorDescriptor:
    """A descriptor without Triton's own checks, which take the host 4 us: x is loadable, and the
    plan has seen to the rest."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.padding = x, "zero"
    made.shape, made.strides, made.block_shape = block
    return made


def prove(device: torch.device, dtype: torch.dtype) -> None:
    """Compile, and try on a small input. Raises KernelError where that fails."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 70, 64, generator=generator).to(device, dtype) for heads in (2, 1, 1)
    )
    try:
        with torch.cuda.device(device):
            for _ in range(2):  # compiled, then launched as it was compiled
                found = attend(q, (k, v), scale=0.125).float().cpu()
    except (TritonError, CalledProcessError, RuntimeError, OSError) as failure:
        raise KernelError(f"Triton: {failure}") from failure
    q, k, v = (x.float().cpu() for x in (q, k, v))
    scores = (q @ k.mT * 0.125).masked_fill(torch.ones(70, 70).triu(1) > 0, float("-inf"))
    if not torch.allclose(found, scores.softmax(-1) @ v, rtol=0.02, atol=0.02):
        raise KernelError("Triton's attention differs from torch's on this device")


def _loadable(x: Tensor) -> Tensor:
    """x, or a copy, as the kernel's loads of 16 bytes want it."""
    batch, head, token, one = x.stride()
    there = one == 1 and not (batch | head | token) & 7 and not x.data_ptr() & 15
    return x if there else x.clone(memory_format=torch.contiguous_format)


def _tile(width: int, device: torch.device) -> Tile:
    """`width`: the larger block of a head, of a key or a value. Where shared memory is big, two
    small programs per multiprocessor are faster than a large one: one multiplies while the other
    computes its weights. So a tile takes half of the memory."""
    if has_big_shared(device):
        return TILE if width <= 128 else WIDE_TILE
    if width <= 128:
        return Tile(128, 64, 8 if width == 128 else 4, 2)
    return Tile(64, 32, 4, 2)


@triton.jit
def _load(
    x, x_token, batch, group, begin, keys,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[KEYS, BLOCK] keys or values from token `begin` on, zeros behind the last."""
    if DESCRIPTORS:
        found = x.load([batch, group, begin, 0]).reshape(KEYS, BLOCK)
    else:
        token, dim = tl.arange(0, KEYS), tl.arange(0, BLOCK)
        seen = token[:, None] < keys - begin
        if SIZE != BLOCK:
            seen = seen & (dim < SIZE)[None, :]
        x += x_token.to(tl.int64) * begin * WIDE
        found = tl.load(x + token[:, None] * (x_token * WIDE) + dim[None, :], mask=seen, other=0.0)
    return found


@triton.jit
def _part(
    best, total, found, query, k, v, k_token, v_token, mask, batch, group, keys,
    at, here, queries, window, factor, cap,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Continue over the keys of one part. Query `at` sits at key `here` + at, counted from the
    part's first."""
    oldest = tl.program_id(0)
    oldest = here + (tl.num_programs(0) - 1 - oldest) * ROWS // GROUP
    newest = tl.minimum(oldest + (ROWS - 1) // GROUP + 1, here + queries - 1)
    first, last = 0, keys
    if mask is None:
        last = tl.minimum(newest + 1, keys)
        if WINDOW:
            first = tl.maximum(oldest - window + 1, 0) // KEYS * KEYS
    for begin in range(first, last, KEYS):
        key = _load(k, k_token, batch, group, begin, keys, DIM, BLOCK_DIM, KEYS, DESCRIPTORS)
        score = tl.dot(query, key.T)
        if CAPPED:  # c tanh(s / c), by an exponential that is exact enough at both ends
            score = cap * (1.0 - 2.0 / (tl.exp2(score * factor) + 1.0))
        place = begin + tl.arange(0, KEYS)
        if mask is not None:
            spot = mask + at[:, None].to(tl.int64) * keys + place[None, :]
            there = (at[:, None] < queries) & (place[None, :] < keys)
            score = tl.where(tl.load(spot, mask=there, other=0) != 0, score, float("-inf"))
        else:
            edge = begin + KEYS > tl.minimum(oldest + 1, keys)
            if WINDOW:
                edge = edge | (begin <= newest - window)
            if edge:
                seen = place[None, :] <= tl.minimum(here + at, keys - 1)[:, None]
                if WINDOW:
                    seen = seen & (place[None, :] > (here + at - window)[:, None])
                score = tl.where(seen, score, float("-inf"))
        if CAPPED:
            higher = tl.maximum(best, tl.max(score, 1))
            share = tl.exp2(score - higher[:, None])
        else:
            higher = tl.maximum(best, tl.max(score, 1) * factor)
            share = tl.exp2(score * factor - higher[:, None])
        kept = tl.exp2(best - higher)
        total = total * kept + tl.sum(share, 1)
        value = _load(v, v_token, batch, group, begin, keys, WIDTH, BLOCK_WIDTH, KEYS, DESCRIPTORS)
        found = tl.dot(share.to(value.dtype), value, found * kept[:, None])
        best = higher
    return best, total, found


@triton.jit(
    do_not_specialize=[
        "q_batch", "q_head", "q_token", "out_batch", "out_head", "out_token", "k_batch", "k_head",
        "k_token", "v_batch", "v_head", "v_token", "past_k_batch", "past_k_head", "past_k_token",
        "past_v_batch", "past_v_head", "past_v_token", "queries", "keys", "before", "window",
        "factor", "cap",
    ],
    do_not_specialize_on_alignment=["mask", "sinks"],
)  # fmt: skip
def _attend(
    q, k, v, past_k, past_v, out, mask, sinks,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    past_k_batch, past_k_head, past_k_token, past_v_batch, past_v_head, past_v_token,
    queries, keys, before, window, factor, cap,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PAST: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """ROWS rows over the keys that they share: token by token, the GROUP heads of a key head.

    `factor` turns products into powers of two; where scores are capped, into those of the cap's
    argument, and `cap` the result.
    """
    batch, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # long programs first
    row, dim, col = start + tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_WIDTH)
    at, head = row // GROUP, group * GROUP + row % GROUP
    real = at < queries
    place = at.to(tl.int64) * q_token + head * q_head
    query = tl.load(
        q + (batch.to(tl.int64) * q_batch + place)[:, None] * WIDE + dim[None, :],
        mask=real[:, None] & (dim < DIM)[None, :], other=0.0,
    )  # fmt: skip
    if not DESCRIPTORS:
        wide_batch = batch.to(tl.int64)
        k += (wide_batch * k_batch + group * k_head) * WIDE
        v += (wide_batch * v_batch + group * v_head) * WIDE
        if PAST:
            past_k += (wide_batch * past_k_batch + group * past_k_head) * WIDE
            past_v += (wide_batch * past_v_batch + group * past_v_head) * WIDE

    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    if sinks is not None:  # as a first key, whose value is 0
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        best = tl.maximum(best, sink)
        total = tl.exp2(sink - best)
    here = keys - queries
    if PAST:
        best, total, found = _part(
            best, total, found, query, past_k, past_v, past_k_token, past_v_token, mask,
            batch, group, before, at, here + before, queries, window, factor, cap,
            GROUP, DIM, WIDTH, BLOCK_DIM, BLOCK_WIDTH, ROWS, KEYS, WINDOW, CAPPED, DESCRIPTORS,
        )  # fmt: skip
    best, total, found = _part(
        best, total, found, query, k, v, k_token, v_token, mask,
        batch, group, keys, at, here, queries, window, factor, cap,
        GROUP, DIM, WIDTH, BLOCK_DIM, BLOCK_WIDTH, ROWS, KEYS, WINDOW, CAPPED, DESCRIPTORS,
    )  # fmt: skip
    place = batch.to(tl.int64) * out_batch + at.to(tl.int64) * out_token + head * out_head
    tl.store(
        out + place[:, None] * WIDE + col[None, :],
        (found / total[:, None]).to(query.dtype),
        mask=real[:, None] & (col < WIDTH)[None, :],
    )


_launch = Launcher(_attend)
