"""Time every CUDA kernel at the shapes of a full-size study; prints one line of JSON.

    python tools/time_kernels.py [--dtype bfloat16] [--only grouped]

Each entry: milliseconds of a launch (median of 10 rounds of 10, CUDA events) and GB/s of the
bytes that the operation has to read and write. `copy` is a device copy of 1 GiB beside them,
`launch_us` the host's time per launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from layersweep.checkpoint import nf4
from layersweep.checkpoint.storage.ggml import DECODED, TYPES
from layersweep.families.spec import Rope
from layersweep.kernels import Kernels, load_kernels
from layersweep.kernels.weights import Alike
from layersweep.kv import lloyd, trellis, trellis_scale
from layersweep.kv.rotate import rotation_weights
from layersweep.model.attention import Rule, choose_attention
from layersweep.model.ops import CudaOps, Parts
from layersweep.model.rope import rope_table

DEVICE = torch.device("cuda:0")
ROUNDS, EACH = 10, 10  # several launches between two events: the host must not be waited for
Case = tuple[str, Callable[[], object], int]


def milliseconds(work: Callable[[], object]) -> float:
    """Median time on the device of one call."""
    for _ in range(3):
        work()
    spent = []
    for _ in range(ROUNDS):
        events = [torch.Event("cuda", enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(EACH):
            work()
        events[1].record()
        torch.cuda.synchronize()
        spent.append(events[0].elapsed_time(events[1]) / EACH)
    return float(statistics.median(spent))


def host_microseconds(work: Callable[[], object]) -> float:
    """Mean time on the host of a call that waits for nothing."""
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(500):
        work()
    spent = time.perf_counter() - started
    torch.cuda.synchronize()
    return round(spent / 500 * 1e6, 2)


def launch_microseconds(kernels: Kernels, dtype: torch.dtype) -> dict[str, float]:
    """Of one of our kernels and, where it is there, of a grouped product in Triton."""
    row, index = torch.zeros(1, 8, dtype=dtype, device=DEVICE), torch.zeros(1, device=DEVICE).long()
    share = torch.zeros(1, device=DEVICE)
    found = {"nvrtc": host_microseconds(lambda: kernels.add_rows_(row, index, row, share))}
    for name, work, _ in grouped_cases(kernels, dtype, rows=1):
        if name.endswith(("_own", "_each")):
            found[name] = host_microseconds(work)
    return found


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def weight_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    code = torch.tensor(nf4.NF4_CODE, device=DEVICE)
    for nested in (True, False):
        q = nf4.quantize(random(torch.float32, 4096, 14336), nested=nested)
        scales = q.nested
        parts = None
        if scales is not None:
            parts = (scales.absmax, scales.quant_map, scales.blocksize, scales.offset)
        out = torch.empty(4096, 14336, dtype=dtype, device=DEVICE)
        args = (q.packed, q.absmax, parts, 64, code, out)
        moved = q.packed.nbytes + q.absmax.nbytes + out.nbytes
        name = "nf4_nested" if nested else "nf4_plain"
        yield name, partial(kernels.nf4_dequantize, *args), moved
    yield _alike_case(kernels, dtype, code)


def _alike_case(kernels: Kernels, dtype: torch.dtype, code: Tensor) -> Case:
    """One matrix of each of 16 experts of Qwen3-30B-A3B, in one launch."""
    step, places = 768 * 2048, range(16)
    scales, each = step // 2, step // 2 + step // 64 * 4  # bytes before them, of an expert
    arenas = torch.randint(0, 64, (16, each), dtype=torch.uint8, device=DEVICE)
    packed, absmax = arenas[0, :scales], arenas[0, scales:].view(torch.float32)
    out = torch.empty(16, step, dtype=dtype, device=DEVICE)
    alike = Alike([at * each for at in places], [0.0 for _ in places], step)
    args = (packed, absmax, None, 64, code, out[0], alike)
    return "nf4_alike_16", partial(kernels.nf4_dequantize_alike, *args), arenas.nbytes + out.nbytes


def ggml_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    """Each type, and rows of q that are put in order on the way."""
    for name in DECODED:
        of, count = TYPES[name], 4096 * 14336
        data = torch.randint(256, (count // of.elements * of.nbytes,), device=DEVICE).byte()
        out = torch.empty(4096, 14336, dtype=dtype, device=DEVICE)
        for what, head in (("", 0), ("_turned", 128)) if name == "Q4_K" else (("", 0),):
            decode = partial(kernels.ggml_dequantize, data, name.lower(), out, head)
            yield f"ggml_{name.lower()}{what}", decode, data.nbytes + out.nbytes


def scaled_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    """FP8, MXFP4, NVFP4 and 4-bit integers in groups of 128."""
    rows, columns = 4096, 14336
    out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)

    def data(nbytes: int) -> Tensor:
        return torch.randint(127, (nbytes,), device=DEVICE, dtype=torch.uint8)

    count, whole = rows * columns, data(4)
    eights, fours = data(count), data(count // 2)
    grid, of_32, of_16 = data(4 * rows * columns // 128**2), data(count // 32), data(count // 16)
    fp8 = partial(kernels.fp8_dequantize, eights, grid, "F32", (128, 128), out)
    yield "fp8", fp8, eights.nbytes + out.nbytes
    yield (
        "mxfp4",
        partial(kernels.mxfp4_dequantize, fours, of_32, out),
        count * 17 // 32 + out.nbytes,
    )
    nvfp4 = partial(kernels.nvfp4_dequantize, fours, of_16, whole, False, out)
    yield "nvfp4", nvfp4, count * 9 // 16 + out.nbytes
    scales, zeros = data(2 * count // 128), data(count // 256)
    index = (torch.arange(columns, device=DEVICE, dtype=torch.int32) // 128).view(torch.uint8)
    for packing in ("rows", "gptq", "awq"):
        for what, of_columns in (("", None), ("_sorted", index)):
            args = packing, fours, scales, "F16", zeros, of_columns, 128, 0, out
            decode = partial(kernels.int4_dequantize, *args)
            yield f"int4_{packing}{what}", decode, fours.nbytes + scales.nbytes + out.nbytes


def row_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    hidden, update = random(dtype, 51200, 4096), random(dtype, 51200, 4096)
    rows = torch.randperm(51200, device=DEVICE)[:12800].sort().values
    norm, x, share = random(dtype, 4096), random(dtype, 12800, 4096), torch.rand(12800).to(DEVICE)
    yield "rms_norm", lambda: kernels.rms_norm(hidden, norm, 1e-5, x, rows), 2 * x.nbytes
    yield "add_rows", lambda: kernels.add_rows_(update, rows, x, share), 3 * x.nbytes
    # silu(x) * 2 is about x for such small x: in place again and again, it must not fade into
    # subnormal numbers, whose division takes twice the time (seen: 0.84 ms, not 0.42).
    gate_up = random(dtype, 12800, 28672).mul_(1e-3)
    gate_up[:, 14336:] = 2.0
    yield "swiglu", lambda: kernels.swiglu_(gate_up), gate_up.nbytes * 3 // 2
    unit = torch.zeros(51200, dtype=torch.int32, device=DEVICE)
    bad = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    leave = partial(kernels.leave_layer_, hidden, update, unit, bad, 1)
    yield "leave_layer", leave, 4 * hidden.nbytes


def router_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    logits = random(dtype, 51200, 128)
    choose = partial(
        kernels.choose_experts,
        logits,
        8,
        over_chosen=False,
        normalize=True,
        scale=1.0,
        rounds=False,
    )
    weights, chosen = choose()
    both = weights.nbytes + chosen.nbytes
    yield "choose_experts_8_of_128", choose, logits.nbytes + both
    sort = partial(kernels.sort_by_expert, chosen, weights, 128)
    yield "sort_by_expert_8_of_128", sort, both + chosen.nbytes + sum(one.nbytes for one in sort())


def attention_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    positions = torch.arange(2560, device=DEVICE)
    cos, sin = (one.to(dtype) for one in rope_table(Rope(1e6, 128), positions, 2560))
    x = random(dtype, 8, 2560, 32, 128).transpose(1, 2)
    out = torch.empty(8, 32, 2560, 128, dtype=dtype, device=DEVICE)
    yield "rope_transposed", lambda: kernels.rope(x, out, cos, sin), 2 * x.nbytes
    yield "rope_in_place", lambda: kernels.rope(out, out, cos, sin), 2 * x.nbytes
    floats = random(torch.float32, 8, 32, 2560, 128)
    yield "rope_from_float", lambda: kernels.rope(floats, out, cos, sin), 3 * floats.nbytes // 2
    yield from lloyd_cases(kernels, random(dtype, 8 * 8 * 1024 * 20, 128))
    # Keys and values of a 1024-token prefix of Mixtral: 32 layers, 8 heads.
    yield from trellis_cases(kernels, random(dtype, 2 * 32 * 8 * 1024, 128))


def rule_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    """A prefix of 4096 tokens under each rule, and heads of 256 numbers as Gemma 2 has them."""
    attention = choose_attention(DEVICE, dtype, torch.cuda.get_device_capability(DEVICE))
    rules = {
        "plain": Rule(), "window": Rule(window=1024), "softcap": Rule(softcap=50.0),
        "softcap_window": Rule(softcap=50.0, window=1024),
    }  # fmt: skip
    sinks = random(dtype, 32)
    for heads, dim in ((32, 128), (16, 256)):
        q, k, v = (random(dtype, 2, 4096, count, dim).transpose(1, 2) for count in (heads, 8, 8))
        moved = 2 * q.nbytes + k.nbytes + v.nbytes
        for name, rule in rules.items():
            if not attention.refusal(rule, dim):
                yield f"attend_{name}_{dim}", partial(attention, q, k, v, rule=rule), moved
        yield f"attend_sinks_{dim}", partial(attention, q, k, v, sinks=sinks[:heads]), moved


def grouped_cases(kernels: Kernels, dtype: torch.dtype, rows: int = 0) -> Iterator[Case]:
    """Both products of a group of experts, in one launch, with cuBLAS for each, and as one product
    of as many operations, the ceiling; with a tile of a study, and with one of the gate; or with
    `rows` for each expert. The bytes are operations: read GB/s as GFLOP/s."""
    if dtype == torch.float32 or torch.cuda.get_device_capability(DEVICE) < (8, 0):
        return
    ops = CudaOps(kernels, DEVICE)
    shapes = {"qwen3_30b": (16, 3200, 2048, 768), "gpt_oss_20b": (5, 6400, 2880, 2880)}
    for name, (parts, mean, hidden, inner) in shapes.items():
        for width, depth in ((2 * inner, hidden), (hidden, inner)):
            sizes = parts, rows or mean, width, depth
            yield from _grouped_shape(f"{name}_{width}x{depth}", dtype, ops, *sizes)
        yield from _grouped_shape(f"{name}_gate", dtype, ops, parts, rows or 32, 2 * inner, hidden)


def _grouped_shape(
    name: str, dtype: torch.dtype, ops: CudaOps, parts: int, mean: int, width: int, depth: int
) -> Iterator[Case]:
    from layersweep.kernels import grouped_triton as grouped

    uneven = torch.linspace(0.1, 1.9, parts).mul(mean).long()
    ends = uneven.cumsum(0)
    rows, starts = int(ends[-1]), [0, *ends.tolist()]
    spans, on_device = list(pairwise(starts)), ends.to(DEVICE)
    x, out = random(dtype, rows, depth), torch.empty(rows, width, dtype=dtype, device=DEVICE)
    weights = random(dtype, parts, width, depth)
    work = 2 * rows * width * depth
    one_by_one = partial(ops.products, x, weights, None, Parts(spans), out)
    yield f"products_{name}_cublas_each", one_by_one, work
    yield f"products_{name}_cublas_one", partial(torch.mm, x, weights[0].t(), out=out), work
    tiles = {
        "own": None, "plain": replace(grouped.LARGE, persistent=False),
        "four_stages": replace(grouped.LARGE, stages=4),
        "tall": replace(grouped.LARGE, rows=256, columns=128),
        "square": replace(grouped.LARGE, columns=128, stages=3, warps=4, persistent=False),
        "no_tma": replace(grouped.LARGE, stages=3, persistent=False, descriptors=False),
        "sm_80": grouped.SMALL,
    }  # fmt: skip
    for label, tile in tiles.items():
        if tile is None or torch.cuda.get_device_capability(DEVICE) >= (9, 0):
            args = (x, weights, None, spans, on_device, out, tile)
            yield f"products_{name}_triton_{label}", partial(grouped.grouped_products, *args), work


def lloyd_cases(kernels: Kernels, x: Tensor) -> Iterator[Case]:
    weights = rotation_weights(128, True, DEVICE).view(-1)
    out = torch.empty_like(x, dtype=torch.float32)
    for bits in (2, 3, 4):
        tables = lloyd.boundaries(bits, DEVICE), lloyd.nearest_values(bits, DEVICE)
        codes, scale = kernels.lloyd_encode(x, bits, weights, *tables)
        packed = codes.nbytes + scale.nbytes
        levels = lloyd.signed_levels(bits, DEVICE)
        yield (
            f"lloyd_encode_{bits}",
            partial(kernels.lloyd_encode, x, bits, weights, *tables),
            x.nbytes + packed,
        )
        args = (codes, scale, bits, weights, levels)
        for name, target in (("", out), ("_to_T", torch.empty_like(x))):
            yield (
                f"lloyd_decode_{bits}{name}",
                partial(kernels.lloyd_decode, *args, target),
                target.nbytes + packed,
            )


def trellis_cases(kernels: Kernels, x: Tensor) -> Iterator[Case]:
    weights = rotation_weights(128, True, DEVICE).view(-1)
    mean = random(torch.float16, len(x) // 1024, 129)
    mean[:, 128] = 1  # the level
    limits = trellis_scale.scale_thresholds(DEVICE)
    out, scales = torch.empty_like(x, dtype=torch.float32), trellis_scale.scale_values(DEVICE)
    for window, bits in ((8, 2), (8, 3), (8, 4), (10, 3)):
        code = trellis.Code(window, bits)
        levels = code.levels(DEVICE)
        tables = (
            trellis_scale.square_thresholds(code.gain, 128, DEVICE),
            trellis_scale.inverse_scales(code.gain, DEVICE),
        )
        u, size = kernels.trellis_scale(x, mean, weights, *tables)
        codes = kernels.trellis_encode(u, bits, levels)
        scale = kernels.trellis_gain(u, codes, size, mean, bits, levels, limits)
        packed, name = codes.nbytes + scale.nbytes, f"{window}_{bits}"
        if bits == 2:
            work = partial(kernels.trellis_scale, x, mean, weights, *tables)
            yield "trellis_scale", work, x.nbytes + u.nbytes
        work = partial(kernels.trellis_encode, u, bits, levels)
        yield f"trellis_encode_{name}", work, u.nbytes + packed
        work = partial(kernels.trellis_gain, u, codes, size, mean, bits, levels, limits)
        yield f"trellis_gain_{name}", work, u.nbytes + packed
        args = (codes, scale, mean, bits, levels, scales, weights, out)
        yield f"trellis_decode_{name}", partial(kernels.trellis_decode, *args), out.nbytes + packed


def score_cases(kernels: Kernels, dtype: torch.dtype) -> Iterator[Case]:
    branches = [random(torch.float32, 128, 128256) for _ in range(4)]
    target = torch.randint(0, 128256, (128,), device=DEVICE)
    for count in (1, 2, 4):
        some, out = branches[:count], torch.empty(count, 128, 3, device=DEVICE)
        work = partial(kernels.score, some, target, out)
        yield f"score_{count}", work, sum(one.nbytes for one in some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--only", default="", help="kernels whose cases have this in their name")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    kernels = load_kernels(DEVICE, dtype)
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    copy = torch.empty_like(source)
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name(DEVICE),
        "dtype": str(dtype),
        "launch_us": launch_microseconds(kernels, dtype),
    }

    def note(name: str, work: Callable[[], object], moved: int) -> None:
        spent = milliseconds(work)
        found[name] = {"ms": round(spent, 4), "gb_per_s": round(moved / spent / 1e6)}

    note("copy", lambda: copy.copy_(source), 2 * source.nbytes)
    rows, attention = (row_cases, router_cases), (attention_cases, rule_cases)
    for cases in (
        weight_cases,
        ggml_cases,
        scaled_cases,
        *rows,
        *attention,
        score_cases,
        grouped_cases,
    ):
        if args.only in cases.__name__:
            for case in cases(kernels, dtype):
                note(*case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
