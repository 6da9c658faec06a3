"""Each kernel against its plain-torch oracle; emulated on the CPU and real on a GPU alike.

Every check draws fresh input from `seed`, which the failure of an assertion shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from half_search import half_search
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.storage.ggml import TYPES
from layersweep.checkpoint.storage.ggml_blocks import Blocks
from layersweep.families.spec import Activation, Rope
from layersweep.kernels import Kernels
from layersweep.kernels.codecs import TRELLIS_CODES
from layersweep.kernels.weights import Alike
from layersweep.kv import lloyd, sinks, trellis, trellis_scale
from layersweep.kv.means import mean_and_level_by_torch, mean_for, sums_by_torch
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import rotate_back, rotation_weights
from layersweep.kv.trellis_search import states_of
from layersweep.model import maths
from layersweep.model.ops import TorchOps
from layersweep.model.rope import rope_table
from layersweep.model.routing import Routing, sort_by_expert

EDGES = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 6e-8, -6e-8, 65504.0)
INT32_MAX = 2**31 - 1
_WORDS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def draw(seed: int, *shape: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device)


def exactly(found: Tensor, wanted: Tensor, seed: int) -> None:
    """Equal bit for bit; NaN equals NaN, whatever its bits."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    word = _WORDS.get(found.dtype, found.dtype)
    found, wanted = found.contiguous(), wanted.contiguous()
    different = found.view(word) != wanted.view(word)
    different &= ~((found != found) & (wanted != wanted))
    assert not different.any(), (seed, int(different.sum()), different.nonzero()[:4].tolist())


def within(found: Tensor, wanted: Tensor, steps: int, seed: int, equal: float = 0.0) -> None:
    """At most `steps` representable numbers apart, and at least a share `equal` without any."""
    word = _WORDS[found.dtype]
    lowest = torch.iinfo(word).min
    order = [one.contiguous().view(word).long() for one in (found, wanted)]
    order = [torch.where(one < 0, lowest - one, one) for one in order]
    apart = (order[0] - order[1]).abs()
    assert found.isfinite().all() and int(apart.max()) <= steps, (seed, int(apart.max()))
    assert (apart == 0).float().mean() >= equal, (seed, (apart == 0).float().mean())


def check_nf4(
    kernels: Kernels,
    device: torch.device,
    shape: tuple[int, ...],
    seed: int,
    blocksize: int = 64,
    nested: bool = True,
    offset_bytes: int = 0,
) -> None:
    """`offset_bytes`: start of the packed bytes in their allocation."""
    weight = draw(seed, *shape, device=device)
    if len(shape) == 2:  # unequal rows make negative nested scales
        weight *= draw(seed + 1, shape[0], 1, device=device).exp()
    q = nf4.quantize(weight, blocksize, nested)
    wanted = nf4.dequantize(q.packed, q.scales(), blocksize, shape, kernels.dtype)
    arena = torch.zeros(q.packed.numel() + offset_bytes, dtype=torch.uint8, device=device)
    packed = arena[offset_bytes:]
    packed.copy_(q.packed)
    scales = q.nested
    parts = scales and (scales.absmax, scales.quant_map, scales.blocksize, scales.offset)
    out = torch.full(shape, 7.0, dtype=kernels.dtype, device=device)
    code = torch.tensor(nf4.NF4_CODE, device=device)
    kernels.nf4_dequantize(packed, q.absmax, parts, blocksize, code, out)
    exactly(out, wanted, seed)


def check_nf4_alike(
    kernels: Kernels, device: torch.device, shape: tuple[int, int], parts: int, seed: int
) -> None:
    """Weights in arenas of equal layout, in any order of memory, dense at equal distances."""
    weights = draw(seed, parts, *shape, device=device)
    made = [nf4.quantize(weight * (1 + at)) for at, weight in enumerate(weights)]
    nested = [one.nested for one in made if one.nested is not None]
    tables = [[n.absmax, n.quant_map] for n in nested]
    kept = [[one.packed, one.absmax, *two] for one, two in zip(made, tables, strict=True)]
    ends = [0, *itertools.accumulate(-(-one.nbytes // 256) * 256 for one in kept[0])]
    arenas = torch.zeros(parts, ends[-1] + 512, dtype=torch.uint8, device=device)
    order = [(3 * at + 1) % parts for at in range(parts)] if parts % 3 else list(range(parts))
    for place, tensors in zip(order, kept, strict=True):
        for start, tensor in zip(ends, tensors, strict=False):
            arenas[place, start : start + tensor.nbytes] = tensor.flatten().view(torch.uint8)
    first = [
        arenas[order[0], start : start + one.nbytes].view(one.dtype)
        for start, one in zip(ends, kept[0], strict=False)
    ]
    step = weights[0].numel() + 8
    dense = torch.full((parts, step), 7.0, dtype=kernels.dtype, device=device)
    alike = Alike(
        [(place - order[0]) * arenas.stride(0) for place in order], [n.offset for n in nested], step
    )
    scales = (first[2], first[3], nested[0].blocksize, 0.0)
    code, out = torch.tensor(nf4.NF4_CODE, device=device), dense[0, : step - 8]
    assert kernels.nf4_dequantize_alike(first[0], first[1], scales, 64, code, out, alike)
    for found, one in zip(dense, made, strict=True):
        wanted = nf4.dequantize(one.packed, one.scales(), 64, shape, kernels.dtype)
        exactly(found[:-8].view(shape), wanted, seed)
        assert found[-8:].eq(7).all()
    odd = Alike([0, 8], [0.0, 0.0], step)  # bytes that no vector load takes
    assert not kernels.nf4_dequantize_alike(first[0], first[1], scales, 64, code, out, odd)


def ggml_bytes(kind: str, blocks: int, seed: int) -> Tensor:
    """Any bytes as blocks, their scales often 0, infinite, NaN, tiny or huge: uint8 [blocks, B]."""
    of, generator = TYPES[kind], torch.Generator().manual_seed(seed)
    data = torch.randint(256, (blocks, of.nbytes), generator=generator, dtype=torch.uint8)
    edges = torch.tensor(EDGES, dtype=torch.float16).view(torch.uint8).view(-1, 2)
    for first in of.halves:
        some = torch.randint(len(data), (len(data) // 2,), generator=generator)
        drawn = torch.randint(len(edges), (len(some),), generator=generator)
        data[some, first : first + 2] = edges[drawn]
    return data


def check_ggml(kernels: Kernels, device: torch.device, kind: str, seed: int, head: int = 0) -> None:
    """A weight of two rows of blocks a column and more, alone and with others that lie alike."""
    rows, columns = 24, 2 * TYPES[kind].elements
    data = torch.stack([ggml_bytes(kind, 48, seed + part).view(-1) for part in range(3)])
    arena = torch.zeros(3, data.shape[1] + 255 & ~255, dtype=torch.uint8, device=device)
    arena[:, : data.shape[1]] = data
    packed = [Blocks(one[: data.shape[1]], TYPES[kind], head) for one in arena]
    step = rows * columns + 8
    dense = torch.full((3, step), 7.0, dtype=kernels.dtype, device=device)
    alike = Alike([at * arena.stride(0) for at in range(3)], [0.0] * 3, step)
    alone = torch.empty(rows, columns, dtype=kernels.dtype, device=device)
    assert packed[0].launch_alike(kernels, dense[0, :-8].view(rows, columns), alike)
    for found, one in zip(dense, packed, strict=True):
        wanted = torch.empty_like(alone)
        one.decode(wanted)
        one.launch(kernels, alone)
        exactly(alone, wanted, seed)
        exactly(found[:-8].view(rows, columns), wanted, seed)
        assert found[-8:].eq(7).all()
    assert not packed[0].launch_alike(kernels, alone, Alike([0, 8], [0.0] * 2, step))


def check_rms_norm(
    kernels: Kernels, device: torch.device, tokens: int, count: int, width: int, seed: int
) -> None:
    x = draw(seed, tokens, width + 8, device=device).to(kernels.dtype)[:, :width]
    weight = (1 + 0.1 * draw(seed + 1, width, device=device)).to(kernels.dtype)
    rows = torch.randperm(tokens, device=device)[:count]
    steps = 16 if kernels.dtype == torch.float32 else 2
    for chosen, offset in ((rows, 0.0), (rows, 1.0), (None, 1.0), (None, 0.0)):
        some = x[rows] if chosen is not None else x[:count]
        out = torch.empty(count, width, dtype=kernels.dtype, device=device)
        kernels.rms_norm(x, weight, 1e-5, out, chosen, offset)
        within(out, maths.rms_norm(some, weight, 1e-5, offset), steps, seed)
    alone = torch.empty(1, width, dtype=kernels.dtype, device=device)
    kernels.rms_norm(x[count - 1 :], weight, 1e-5, alone)
    exactly(alone[0], out[count - 1], seed)
    own = x[:count].contiguous()
    kernels.rms_norm(own, weight, 1e-5, own)
    exactly(own, out, seed)


def check_swiglu(kernels: Kernels, device: torch.device, count: int, inner: int, seed: int) -> None:
    gate_up = (3 * draw(seed, count, 2 * inner, device=device)).to(kernels.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    wanted, kept = F.silu(gate).mul_(up), up.clone()
    result = kernels.swiglu_(gate_up)
    steps, equal = (8, 0.3) if kernels.dtype == torch.float32 else (2, 0.99)
    within(result, wanted, steps, seed, equal)
    assert result.data_ptr() == gate_up.data_ptr() and result.shape == (count, inner)
    exactly(gate_up[:, inner:], kept, seed)


def check_activations(
    kernels: Kernels, device: torch.device, count: int, inner: int, seed: int
) -> None:
    """Every activation, gate and up in halves and as neighbours."""
    acts: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu", "relu2", "swiglu_clamped")
    for act, interleaved in itertools.product(acts, (False, True)):
        gate_up = (3 * draw(seed, count, 2 * inner, device=device)).to(kernels.dtype)
        gate_up[0, :2] = float("nan")
        wanted = maths.glu_(gate_up.clone(), act, interleaved=interleaved, limit=2.0)
        result = kernels.swiglu_(gate_up, act, interleaved, limit=2.0)
        assert result.data_ptr() == gate_up.data_ptr() and result.shape == (count, inner)
        assert result[0, 0].isnan() and wanted[0, 0].isnan()
        # Steps of the largest term: 1 + tanh and 1 + erf cancel where the gate is negative.
        last_bits = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
        rest = result.flatten()[2:].float(), wanted.flatten()[2:].float()
        close = last_bits[kernels.dtype]
        torch.testing.assert_close(*rest, rtol=close, atol=close, msg=f"{act}, seed {seed}")


def check_add_rows(
    kernels: Kernels, device: torch.device, tokens: int, count: int, width: int, seed: int
) -> None:
    update = draw(seed, tokens, width, device=device).to(kernels.dtype)
    y = draw(seed + 1, count, width, device=device).to(kernels.dtype)
    rows = torch.randperm(tokens, device=device)[:count]
    weight = draw(seed + 2, count, device=device).sigmoid()
    wanted = update.clone()
    wanted[rows] += (y * weight[:, None]).to(y.dtype)
    kernels.add_rows_(update, rows, y, weight)
    exactly(update, wanted, seed)


def check_add_places(
    kernels: Kernels, device: torch.device, tokens: int, experts: int, per_row: int, width: int,
    seed: int,
) -> None:  # fmt: skip
    """Some experts of a routing at once: equal to one after the other, bit for bit."""
    scores = draw(seed, tokens, experts, device=device)
    weights, chosen = scores.softmax(-1).topk(per_row, dim=-1)
    routing = sort_by_expert(chosen, weights, experts)
    Routing.settle([routing])
    first, last = routing.start[1], routing.start[experts - 1]
    share = routing.weights[first:last]
    y = draw(seed + 1, last - first, width, device=device).to(kernels.dtype)
    update = draw(seed + 2, tokens, width, device=device).to(kernels.dtype)
    wanted = update.clone()
    for expert in range(1, experts - 1):
        own = slice(routing.start[expert], routing.start[expert + 1])
        there = slice(own.start - first, own.stop - first)
        kernels.add_rows_(wanted, routing.rows[own], y[there], share[there])
    other = update.clone()
    kernels.add_places_(update, routing.places, first, y, share)
    exactly(update, wanted, seed)
    TorchOps().add_places_(other, routing.places, first, y, share)
    within(other, wanted, 2, seed, 0.99)


def check_leave_layer(
    kernels: Kernels, device: torch.device, tokens: int, width: int, seed: int
) -> None:
    hidden = draw(seed, tokens, width, device=device).to(kernels.dtype)
    update = draw(seed + 1, tokens, width, device=device).to(kernels.dtype)
    units = 5
    unit = (torch.arange(tokens, device=device) % units).int()
    for row, value in ((1, float("nan")), (2, float("inf")), (3, float("-inf"))):
        update[row, width - row] = value
    largest = torch.finfo(kernels.dtype).max
    hidden[4, 0] = update[4, 0] = largest  # finite, but not their sum
    wanted = hidden + update
    first_bad = torch.full((units,), INT32_MAX, dtype=torch.int32, device=device)
    first_bad[3] = 6
    kernels.leave_layer_(hidden, update, unit, first_bad, 11)
    exactly(hidden, wanted, seed)
    assert not update.any() and first_bad.tolist() == [INT32_MAX, 11, 11, 6, 11]


def check_rope(
    kernels: Kernels, device: torch.device, shape: tuple[int, int, int, int], seed: int
) -> None:
    """Whole heads and a part of each; pairs that are halves and neighbours; two branches."""
    batch, heads, tokens, width = shape
    first, dtype = 3, kernels.dtype
    floats = draw(seed, batch, tokens, heads, width, device=device).transpose(1, 2)
    for dim, interleaved in itertools.product({width, (width + 2) // 4 * 2}, (False, True)):
        table = Rope(1e4, dim, interleaved=interleaved)
        positions = torch.arange(first + tokens + 2, device=device)
        cos, sin = (one.to(dtype) for one in rope_table(table, positions, len(positions)))
        here = slice(first, first + tokens)
        for x in (floats, floats.to(dtype), floats.to(dtype).contiguous()):
            wanted = maths.rope(x.to(dtype), cos[here], sin[here], interleaved=interleaved)
            out = torch.zeros(shape, dtype=dtype, device=device)
            kernels.rope(x, out, cos, sin, first, interleaved)
            exactly(out, wanted, seed)
        x = floats.to(dtype)
        kernels.rope(x, x, cos, sin, first, interleaved)
        exactly(x, wanted, seed)
        length = tokens // 3
        prefix = tokens - 2 * length
        own = [*range(first + prefix, first + prefix + length)]
        places = [*range(first, first + prefix), *own, *own]
        given, branched = floats.to(dtype), (prefix, length)
        wanted = maths.rope(given, cos[places], sin[places], interleaved=interleaved)
        kernels.rope(given, out, cos, sin, first, interleaved, branched)
        exactly(out, wanted, seed)
        told = {"interleaved": interleaved, "branched": branched}
        exactly(TorchOps().rope(given, cos, sin, first, out.zero_(), **told), wanted, seed)


def check_lloyd(
    kernels: Kernels, device: torch.device, count: int, dim: int, bits: int, seed: int
) -> None:
    floats = draw(seed, count, dim, device=device)
    floats *= (2 * draw(seed + 1, count, 1, device=device)).exp()
    floats[0] = 0.0
    floats[count // 2] *= 1e5  # beyond the fp16 scale
    weights = rotation_weights(dim, True, device).view(-1)
    tables = lloyd.boundaries(bits, device), lloyd.nearest_values(bits, device)
    for x in (floats, floats.to(kernels.dtype)):
        x = torch.where(x.isfinite(), x, 1.0)
        codes, scale = kernels.lloyd_encode(x, bits, weights, *tables)
        wanted_codes, wanted_scale = lloyd.Lloyd(bits, bits).encode_rows(x, bits)
        exactly(scale, wanted_scale, seed)
        exactly(codes, wanted_codes, seed)
        wanted = lloyd.Lloyd(bits, bits).decode_rows(codes, scale, dim, bits)
        for dtype in (torch.float32, kernels.dtype):
            out = torch.empty(count, dim, dtype=dtype, device=device)
            levels = lloyd.signed_levels(bits, device)
            kernels.lloyd_decode(codes, scale, bits, weights, levels, out)
            exactly(out, wanted.to(dtype), seed)


def check_lloyd_nonfinite(kernels: Kernels, device: torch.device, dim: int) -> None:
    """A vector with NaN or infinity decodes non-finite, its neighbours as ever."""
    weights = rotation_weights(dim, True, device).view(-1)
    for bits in (1, 3, 6):
        tables = lloyd.boundaries(bits, device), lloyd.nearest_values(bits, device)
        x = torch.ones(4, dim, dtype=torch.float32, device=device)
        x[1, 3], x[2, dim - 1] = float("nan"), float("-inf")
        codes, scale = kernels.lloyd_encode(x, bits, weights, *tables)
        out = torch.empty_like(x)
        levels = lloyd.signed_levels(bits, device)
        kernels.lloyd_decode(codes, scale, bits, weights, levels, out)
        assert out.isfinite().all(1).tolist() == [True, False, False, True]


def check_trellis(
    kernels: Kernels,
    device: torch.device,
    count: int,
    dim: int,
    bits: int,
    window: int,
    seed: int,
    ties: bool = False,
) -> None:
    """Search and decoder for any levels; with `ties` there are many paths of equal cost."""
    u = draw(seed, count, dim, device=device)
    levels = draw(seed + 1, 1 << window, device=device)
    if ties:
        u, levels = u.round(), levels.mul(2).round() / 2
    u[count // 3] = 0.0
    codes = kernels.trellis_encode(u, bits, levels)
    symbols = half_search(u.t().contiguous(), levels, bits)
    exactly(codes, pack_bits(symbols, bits), seed)
    codes = torch.randint(0, 256, codes.shape, dtype=torch.uint8, device=device)
    scale = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    states = states_of(unpack_bits(codes, bits), len(levels), bits).long()
    scales = trellis_scale.scale_values(device)
    weights = rotation_weights(dim, True, device).view(-1)
    for mean in (None, means_and_levels(seed + 2, 1, dim, device)):
        factor = scales[scale.long()]
        if mean is not None:
            factor = factor * mean[0, dim].float()
        wanted = rotate_back(levels[states] * factor, randomized=True)
        out = torch.empty(count, dim, dtype=torch.float32, device=device)
        kernels.trellis_decode(codes, scale, mean, bits, levels, scales, weights, out)
        exactly(out, wanted if mean is None else wanted + mean[0, :dim].float(), seed)


def check_column_sums(
    kernels: Kernels, device: torch.device, shape: tuple[int, int, int, int], seed: int
) -> None:
    """Of what lies contiguous, and of a slice of heads that lie behind one another in a row."""
    batch, heads, tokens, dim = shape
    x = draw(seed, batch, tokens + 3, heads + 2, dim, device=device)
    for dtype in {torch.float32, kernels.dtype}:
        apart = x.to(dtype)[:, 1 : tokens + 1, 1 : heads + 1].transpose(1, 2)
        for given in (apart, apart.contiguous()):
            exactly(kernels.column_sums(given), sums_by_torch(given), seed)


def check_mean_and_level(
    kernels: Kernels, device: torch.device, shape: tuple[int, int, int, int], seed: int
) -> None:
    """Of many sizes, of nothing around its mean, of zeros, and of what is not finite."""
    x = draw(seed, *shape, device=device)
    x *= draw(seed + 1, *shape[:2], 1, 1, device=device).mul(3).exp()
    x[0, 0], x[-1, 0] = draw(seed + 2, shape[3], device=device), 0.0
    x[0, -1, 0, 0] = (torch.nan, torch.inf, 3e38)[seed % 3]
    sums = sums_by_torch(x)
    found = kernels.mean_and_level(sums, shape[2])
    exactly(found, mean_and_level_by_torch(sums, shape[2]), seed)


def means_and_levels(seed: int, count: int, dim: int, device: torch.device) -> Tensor:
    """Rows as kv.means.mean_for gives them, float16 [count, dim + 1]."""
    mean = draw(seed, count, dim + 1, device=device)
    mean[:, dim] = mean[:, dim].exp()
    return mean.half()


def check_trellis_scale(kernels: Kernels, device: torch.device, dim: int, seed: int) -> None:
    """What comes before and after the search, with one mean for all, with several and with none."""
    weights = rotation_weights(dim, True, device).view(-1)
    limits = trellis_scale.scale_thresholds(device)
    x = draw(seed, 42, dim, device=device)
    x *= draw(seed + 1, 42, 1, device=device).mul(4).exp()  # many sizes
    x[0], x[5], x[6, 2], x[7, 0], x[8, dim - 1], x[9] = 0.0, 1e-9, torch.nan, torch.inf, 3e38, 6e4
    for dtype in {torch.float32, kernels.dtype}:
        given = x.to(dtype)
        for means in (0, 1, 3):
            mean = means_and_levels(seed + 2, means, dim, device) if means else None
            centered, level = given, torch.ones(42, device=device)
            if mean is not None:
                each = mean.float().repeat_interleave(42 // means, 0)
                centered, level = given.float() - each[:, :dim], each[:, dim]
            for code in (trellis.Code(window, bits) for window, bits in TRELLIS_CODES):
                if dim * code.bits < code.window:
                    continue
                squares = trellis_scale.square_thresholds(code.gain, dim, device)
                tables = weights, squares, trellis_scale.inverse_scales(code.gain, device)
                u, size = kernels.trellis_scale(given, mean, *tables)
                wanted_u, wanted_size = trellis._scale_rows(centered, level, code)
                exactly(size, wanted_size, seed)
                exactly(u, wanted_u.t(), seed)
                codes = torch.randint(0, 256, (42, dim * code.bits // 8), device=device).byte()
                levels = code.levels(device)
                symbols = trellis.search(u[::2].t().contiguous(), levels, code.bits)
                codes[::2] = pack_bits(symbols, code.bits)
                scale = kernels.trellis_gain(u, codes, size, mean, code.bits, levels, limits)
                symbols = unpack_bits(codes, code.bits)
                dot = trellis._dot_rows(u.t().contiguous(), symbols, code)
                exactly(scale, trellis_scale.reached(size, limits, level * dot).byte(), seed)
                assert (scale[6:8] == 255).all() and (u[6:8] == 0).all()
                assert mean is not None or scale[0] == 0


def check_trellis_codec(kernels: Kernels, device: torch.device, bits: int, seed: int) -> None:
    """The whole codec by kernels equals it by torch with their search; the mean with a level and
    without."""
    code = trellis.Code(8, bits)
    x = draw(seed, 2, 3, 20, 64, device=device).to(kernels.dtype)
    for mean in (x.float().mean(2).half(), mean_for(trellis.Trellis(bits, bits), x)):
        found = trellis._encode_by_kernels(kernels, x, code, mean)
        with patch.object(trellis, "search", half_search):
            by_torch = trellis._encode_by_torch(x, code, mean)
        for one, wanted in zip(found, by_torch, strict=True):
            exactly(one, wanted, seed)


def check_trellis_nonfinite(kernels: Kernels, device: torch.device, dim: int) -> None:
    """A vector with NaN or infinity gets some codes, and its neighbours those they always get."""
    table = draw(1, 256, device=device)
    for bits in (1, 2, 3, 4):
        u = draw(bits, 6, dim, device=device)
        wanted = kernels.trellis_encode(u, bits, table)
        u[1, 3], u[2, dim - 1], u[4] = float("nan"), float("-inf"), 3e38
        found = kernels.trellis_encode(u, bits, table)
        exactly(found[[0, 3, 5]], wanted[[0, 3, 5]], bits)


def score_oracle(branches: Sequence[Tensor], target: Tensor) -> Tensor:
    """As maths.score_branches scores them, in float64, with torch.argmax's choice among NaN."""
    p, scores = branches[0].double().log_softmax(-1), []
    for branch in branches:
        q = branch.double().log_softmax(-1)
        loss = -q.gather(1, target[:, None])[:, 0]
        kl = (p.exp() * (p - q)).sum(-1)
        agree = branch.argmax(-1) == branches[0].argmax(-1)
        scores.append(torch.stack((loss, kl, agree.double()), dim=1))
    return torch.stack(scores)


def scored(kernels: Kernels, branches: Sequence[Tensor], target: Tensor) -> Tensor:
    out = torch.full((len(branches), len(target), 3), -7.0, device=target.device)
    kernels.score(branches, target, out)
    return out


def check_score(
    kernels: Kernels, device: torch.device, tokens: int, vocabulary: int, arms: int, seed: int
) -> None:
    """Arms near the exact branch, but for the last one, which equals it, in memory of any start."""
    exact = 4 * draw(seed, tokens, vocabulary, device=device)
    branches = [exact] * (1 + arms)
    for arm in range(1, arms):
        moved = torch.empty(exact.numel() + seed % 4, device=device)[seed % 4 :].view_as(exact)
        branches[arm] = moved.copy_(exact + 0.1 * draw(seed + arm, *exact.shape, device=device))
    target = torch.randint(0, vocabulary, (tokens,), device=device)
    found, wanted = scored(kernels, branches, target), score_oracle(branches, target)
    assert ((found - wanted).abs() <= 1e-6 * (1 + wanted.abs())).all(), seed
    if arms:
        exactly(found[-1], found[0], seed)
    assert (found[0, :, 1] == 0).all() and (found[0, :, 2] == 1).all()


def check_score_of_confident_rows(kernels: Kernels, device: torch.device, seed: int) -> None:
    """Nearly all chance in one token, logits far from 0: errors of exp and of sums cancel."""
    exact = draw(seed, 8, 9001, device=device)
    target = torch.arange(5, 9001, 1125, device=device)
    exact[torch.arange(8, device=device), target] += 25
    exact += 1000
    arm = exact + 0.1 * draw(seed + 1, 8, 9001, device=device) + 2
    found = scored(kernels, [exact, arm], target)
    wanted = score_oracle([exact, arm], target)
    assert ((found - wanted).abs() <= 2e-7).all(), seed


def check_score_edges(kernels: Kernels, device: torch.device) -> None:
    """What torch's own arithmetic finds where logits tie, are huge or are not finite; the lowest
    index is the best token, NaN above all, wherever the parts and runs of a row end."""
    inf, nan, lowest = float("inf"), float("nan"), torch.finfo(torch.float32).min
    exact = draw(3, 12, 9099, device=device)
    exact[:, 33], exact[:, 33 + 32 * 18] = 9.0, 9.0  # of one thread
    arm, target = exact.clone(), torch.full((12,), 7, device=device)
    arm[1, 33] = 8.9  # the second of the best
    arm[2, 700], arm[2, 2000], arm[2, 1000], exact[2, 1000] = 10.0, nan, nan, nan
    arm[3, 1000], exact[4, 8193], arm[4, 9095] = inf, nan, nan
    exact[5, 5], exact[5, 9098] = inf, inf
    exact[6, 8192:], arm[6, 8192:] = -inf, -inf  # the whole of a part
    exact[7, 9086:] = -inf
    exact[8], arm[8] = -inf, -inf
    exact[8, 8596], arm[8, 8796], target[8] = lowest, lowest, 8596
    exact[9], target[9] = exact[9] * 1e37, 33
    arm[9] = exact[9]
    exact[10, 9095], arm[10, 9097], target[10] = 10.0, 10.0, 8192  # past the last whole run
    exact[11], arm[11] = lowest, lowest
    found, wanted = scored(kernels, [exact, arm], target), score_oracle([exact, arm], target)
    wanted[0, 6:9, 1] = 0.0  # a row against itself: no infinity is taken from another
    assert found[1, :, 2].tolist() == wanted[1, :, 2].tolist()
    assert found[1, :, 2].tolist() == [1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1]
    assert torch.equal(found.isfinite(), wanted.isfinite()), (found, wanted)
    finite = wanted.isfinite()
    torch.testing.assert_close(found[finite].double(), wanted[finite], rtol=1e-6, atol=1e-6)


def check_sinks(
    kernels: Kernels, device: torch.device, shape: tuple[int, int, int, int], seed: int
) -> None:
    """Found among vectors of any layout, around a center that some of them lie near; and moved, as
    they are and less their first tokens."""
    batch, heads, tokens, dim = shape
    mean = draw(seed, batch, heads, dim + 1, device=device).to(torch.float16)
    center = draw(seed + 1, batch, heads, 1, dim, device=device).to(torch.float16)
    x = draw(seed + 2, batch, tokens, heads + 1, dim, device=device)
    near = (torch.arange(tokens, device=device) % 3 == 0)[:, None, None]
    around = torch.where(near, center.transpose(1, 2).float(), mean[..., :dim][:, None].float())
    x[:, :, 1:] += around
    x[0, -1] = (torch.nan, torch.inf, 3e38)[seed % 3]
    for dtype in {torch.float32, kernels.dtype}:
        given = x.to(dtype)[:, :, 1:].transpose(1, 2)
        wanted = sinks.flags_by_torch(given, center, mean)
        exactly(kernels.find_sinks(given, center, mean), wanted, seed)
    found = sinks.Found(center, wanted)
    assert wanted.any() or tokens == 1  # which is not finite
    for first in (0, 8 if tokens > 8 else 0):
        for moved in (x[:, first:, 1:].transpose(1, 2), x[:, first:, 1:].transpose(1, 2).clone()):
            some, sign = found.without(first), 1 - 2 * (first > 0)
            after = some.shift_by_torch(moved, mean, sign)
            kernels.shift_sinks_(moved, center, mean, some.flags, sign)
            exactly(moved, after, seed)
