"""What the kernels do, with shapes; T is the compute dtype. Oracles are named in each method."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from layersweep.kernels.codecs import CODEC_LAYOUTS, MAX_VECTOR, same
from layersweep.kernels.nvrtc import KernelError, compile_cubin, read_source
from layersweep.kernels.packed import PACKED_LAYOUTS, PackedKernels
from layersweep.kernels.router import ROUTER_LAYOUTS, RouterKernels
from layersweep.kernels.runtime import Argument, Module
from layersweep.kernels.weights import WEIGHT_LAYOUTS

SCALARS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2", "swiglu_clamped")
# Branches that score.cu reads together, logits of a row that a warp takes, what it leaves of them.
SCORED_TOGETHER, SCORED_PART, PART_BYTES = 5, 8192, 32
# Parameters of every kernel in the order of its declaration; see Module.
LAYOUTS: dict[str, dict[str, str]] = {
    **WEIGHT_LAYOUTS,
    **ROUTER_LAYOUTS,
    "rows": {
        "rms_norm": "4Pqif",
        "rms_norm_offset": "4Pqi2f",
        "rms_norm_narrow": "4Pqi2fi",
        **{f"glu{pairs}_{act}": "Pif" for pairs in ("", "_pairs") for act in ACTIVATIONS},
        "add_rows": "4Pi",
        "add_places": "4P4i",
        "leave_layer": "4P2i",
    },
    "rope": {
        f"rope{pairs}_{width}{source}": "4P6q2iq2i"
        for pairs in ("", "_pairs")
        for width in ("wide", "any")
        for source in ("", "_f32")
    },
    "score": {
        **{f"score_parts_{rows}": f"{rows}P2P3i" for rows in range(1, SCORED_TOGETHER + 1)},
        "score_join": "2P3i",
    },
    "capped": {"attend_capped": "6P12q4i2f"},
    **CODEC_LAYOUTS,
    **PACKED_LAYOUTS,
}
NARROW, ROWS_OF_A_BLOCK = 256, 8  # numbers that a warp holds; rows or their parts, a warp each


@functools.cache
def load_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels of a CUDA device for T = `dtype` (float16, bfloat16 or float32).

    Compiles the smallest source at once, which proves NVRTC and the driver, the others when they
    are first used. Raises KernelError where there is neither.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise KernelError(f"kernels need a CUDA device, not {device}")
    if dtype not in SCALARS:
        raise KernelError(f"kernels know {', '.join(map(str, SCALARS))}, not {dtype}")
    index = torch.cuda.current_device() if device.index is None else device.index
    where = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(where)

    @functools.cache
    def module(name: str, dim: int = 0) -> Module:
        return Module(_cubin(name, capability, SCALARS[dtype], dim), LAYOUTS[name], where)

    kernels = Kernels(dtype, module)
    module("rows")
    return kernels


@functools.cache
def _cubin(name: str, capability: tuple[int, int], scalar: int, dim: int) -> bytes:
    """Compiled once for all devices of a kind: the trellis takes seconds."""
    defines = {"SCALAR": scalar} | ({"DIM": dim} if dim else {})
    return compile_cubin(read_source(name), capability, defines)


class Kernels(RouterKernels, PackedKernels):
    """Launches on the current stream of its device; arguments are asserted, not corrected.

    Rows are H or I elements long, multiples of 8, at 16-byte-aligned addresses. Tensors are
    contiguous unless a method says otherwise. H, I, D, N, R and T as in model/maths.py.
    """

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        rows: Tensor | None = None,
        offset: float = 0.0,
    ) -> None:
        """out [N, H] = maths.rms_norm(x[rows], weight, eps, offset); without rows, of x's first N
        rows.

        x [R, H] with contiguous last dimension, weight [H], rows int64 [N].
        """
        count, width = out.shape
        _rows(out, self.dtype)
        same(weight, self.dtype)
        assert x.dtype == self.dtype and x.dim() == 2 and x.shape[1] == width and x.stride(1) == 1
        assert x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
        assert weight.numel() == width and (rows is not None or len(x) >= count)
        if rows is not None:
            same(rows, torch.int64)
            assert len(rows) == count
        if count == 0:
            return
        module, args = self._module("rows"), (x, weight, rows, out, x.stride(0), width, eps)
        if width <= NARROW:
            grid = -(-count // ROWS_OF_A_BLOCK), 1, 1
            threads = 32 * ROWS_OF_A_BLOCK
            module.launch("rms_norm_narrow", grid, threads, (*args, offset, count))
            return
        threads = min(256, -(-width // 256) * 32)
        name, more = ("rms_norm_offset", (offset,)) if offset else ("rms_norm", ())
        module.launch(name, (count, 1, 1), threads, (*args, *more))

    def swiglu_(
        self, gate_up: Tensor, act: str = "silu", interleaved: bool = False, limit: float = 0.0
    ) -> Tensor:
        """gate_up [N, 2I]: the first I columns become act(gate) * up, as in maths.glu_.

        Returns them, a view [N, I] with row stride 2I.
        """
        count, width = gate_up.shape
        inner = width // 2
        _rows(gate_up, self.dtype)
        assert inner % 8 == 0 and act in ACTIVATIONS
        args = (gate_up, inner, limit)
        if not interleaved:
            self._columns(f"glu_{act}", count, inner, args)
        elif count:
            threads = min(256, -(-inner // 256) * 32)
            self._module("rows").launch(f"glu_pairs_{act}", (count, 1, 1), threads, args)
        return gate_up[:, :inner]

    def add_rows_(self, update: Tensor, rows: Tensor, y: Tensor, weight: Tensor) -> None:
        """update[rows] += (y * weight[:, None]).to(T); update [R, H], y [N, H], weight f32.

        rows int64 [N], each at most once.
        """
        count, width = y.shape
        _rows(update, self.dtype)
        _rows(y, self.dtype)
        same(rows, torch.int64)
        same(weight, torch.float32)
        assert update.shape[1] == width and rows.numel() == weight.numel() == count
        self._columns("add_rows", count, width, (update, rows, y, weight, width))

    def add_places_(
        self, update: Tensor, places: Tensor, first: int, y: Tensor, weight: Tensor
    ) -> None:
        """See TorchOps.add_places_: update [N, H], places int32 [N, K] ascending, y [P, H],
        weight float32 [P]."""
        count, width = y.shape
        _rows(update, self.dtype)
        _rows(y, self.dtype)
        same(places, torch.int32)
        same(weight, torch.float32)
        assert places.shape[0] == update.shape[0] and update.shape[1] == width
        assert weight.numel() == count
        args = (update, places, y, weight, width, first, count, places.shape[1])
        self._columns("add_places", len(update), width, args)

    def leave_layer_(
        self, hidden: Tensor, update: Tensor, unit: Tensor, first_bad: Tensor, layer: int
    ) -> None:
        """hidden += update; update = 0; first_bad[unit[r]] = min(it, layer) if a row is not finite.

        hidden, update [R, H]; unit int32 [R]; first_bad int32 [units], 2^31 - 1 where none is bad.
        """
        count, width = hidden.shape
        _rows(hidden, self.dtype)
        _rows(update, self.dtype)
        same(unit, torch.int32)
        same(first_bad, torch.int32)
        assert update.shape == hidden.shape and len(unit) == count
        self._columns("leave_layer", count, width, (hidden, update, unit, first_bad, width, layer))

    def rope(
        self,
        x: Tensor,
        out: Tensor,
        cos: Tensor,
        sin: Tensor,
        first: int = 0,
        interleaved: bool = False,
        branched: tuple[int, int] | None = None,
    ) -> None:
        """out = maths.rope(x.to(T), cos, sin) for tokens at positions first, first + 1, ...;
        `branched` as in TorchOps.rope.

        x (T or float32) and out (T) [B, heads, T, D], any strides with the last dimension
        contiguous; out may be x. cos, sin (T) [S, R], S >= first + T; R even, up to 256 and D.
        """
        batch, heads, tokens, width = x.shape
        dim = cos.shape[1]
        assert out.shape == x.shape and out.dtype == self.dtype and dim % 2 == 0 and dim <= width
        assert x.dtype in (self.dtype, torch.float32) and x.stride(3) == out.stride(3) == 1
        assert heads < 65536 and batch < 65536 and dim <= MAX_VECTOR
        same(cos, self.dtype)
        same(sin, self.dtype)
        prefix, length = branched or (tokens, 1)
        assert cos.shape == sin.shape
        assert len(cos) >= first + (prefix + length if branched else tokens)
        if x.numel() == 0:
            return
        if dim < width and out.data_ptr() != x.data_ptr():
            out[..., dim:] = x[..., dim:]
        strides = (*x.stride()[:3], *out.stride()[:3])
        pointers = (x, out, cos, sin)
        used = [step for size, step in zip(x.shape[:3] * 2, strides, strict=True) if size > 1]
        wide = dim % 16 == 0 and all(step % 8 == 0 for step in used)
        wide = wide and all(one.data_ptr() % 16 == 0 for one in pointers)
        name = ("rope_pairs" if interleaved else "rope") + ("_wide" if wide else "_any")
        if x.dtype != self.dtype:
            name += "_f32"
        grid = -(-tokens * (dim // 16 if wide else dim // 2) // 256)
        args: list[Argument] = [*pointers, *strides, tokens, dim, first, prefix, length]
        self._module("rope").launch(name, (grid, heads, batch), 256, args)

    def attend_capped(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        softcap: float,
        window: int | None = None,
        mask_TS: Tensor | None = None,
        sinks_Q: Tensor | None = None,
    ) -> Tensor:
        """Causal attention [B, Q, T, D] with scores softcap * tanh(scale * q.k / softcap).

        q [B, Q, T, D] at the last T of S places; k, v [B, G, S, D]; D a multiple of 8 up to 256,
        any strides that are multiples of 8. Oracle: model.attention.PlainAttention. With a mask,
        True where a query may look, that is the rule, else the newest `window` keys.
        """
        batch, heads, queries, dim = q.shape
        keys = k.shape[2]
        out = torch.empty(batch, queries, heads, dim, dtype=self.dtype, device=q.device)
        out = out.transpose(1, 2)
        assert k.shape == v.shape and dim % 8 == 0 and dim <= MAX_VECTOR
        for one in (q, k, v):
            assert one.dtype == self.dtype and one.stride(3) == 1 and one.data_ptr() % 16 == 0
            assert all(step % 8 == 0 for step in one.stride()[:3])
        mask = None if mask_TS is None else mask_TS.contiguous().view(torch.uint8)
        assert mask is None or (window is None and mask.shape == (queries, keys))
        strides = [step for one in (q, k, v, out) for step in one.stride()[:3]]
        sizes = (queries, keys, keys if window is None else window, heads // k.shape[1])
        sinks = None if sinks_Q is None else sinks_Q.float()
        args: list[Argument] = [q, k, v, out, mask, sinks, *strides, *sizes, scale, softcap]
        grid = (-(-queries // 64), heads, batch)
        self._module("capped", dim).launch("attend_capped", grid, 256, args)
        return out

    def score(self, branches: Sequence[Tensor], target: Tensor, out: Tensor) -> None:
        """out float32 [branches, T, 3] = maths.score_branches(branches, target).

        branches float32 [T, V] each, target int64 [T]. The lowest index wins among equal maxima.
        """
        exact, *arms = branches
        same(target, torch.int64)
        same(out, torch.float32)
        for one in branches:
            same(one, torch.float32)
            assert one.shape == exact.shape
        assert target.shape == exact.shape[:1] and out.shape == (len(branches), len(exact), 3)
        if len(exact) == 0:
            return
        launches = max(1, -(-len(arms) // (SCORED_TOGETHER - 1)))
        step = max(1, -(-len(arms) // launches))
        for first in range(0, max(1, len(arms)), step):
            self._score([exact, *arms[first : first + step]], target, out, 1 + first)

    def _score(self, rows: Sequence[Tensor], target: Tensor, out: Tensor, first: int) -> None:
        """The exact branch and some arms, branches from `first` on, read together."""
        positions, width = rows[0].shape
        parts = -(-width // SCORED_PART)
        count = positions * parts * len(rows) * PART_BYTES
        memory = torch.empty(count, dtype=torch.uint8, device=target.device)
        wide = width % 4 == 0 and all(one.data_ptr() % 16 == 0 for one in rows)
        module, blocks = self._module("score"), -(-positions * parts // ROWS_OF_A_BLOCK)
        args: list[Argument] = [*rows, target, memory, positions, width, wide]
        threads = 32 * ROWS_OF_A_BLOCK
        module.launch(f"score_parts_{len(rows)}", (blocks, 1, 1), threads, args)
        join = (memory, out, parts, len(rows), first)
        module.launch("score_join", (positions, len(rows), 1), 32, join)

    def _columns(self, name: str, count: int, width: int, args: Sequence[Argument]) -> None:
        """Launch a kernel of rows.cu whose blocks take 8 elements per thread of one row."""
        if count == 0:
            return
        threads = min(256, -(-width // 256) * 32)
        grid = (count, -(-width // (8 * threads)), 1)
        self._module("rows").launch(name, grid, threads, args)


def _rows(tensor: Tensor, dtype: torch.dtype) -> None:
    same(tensor, dtype)
    assert tensor.shape[1] % 8 == 0 and tensor.data_ptr() % 16 == 0, tuple(tensor.shape)
