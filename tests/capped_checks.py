"""The CUDA kernel for capped scores against the oracle; emulated on the CPU and real on a GPU."""

from __future__ import annotations

import torch
from kernel_checks import draw

from layersweep.kernels import Kernels
from layersweep.model.attention import PlainAttention, Rule


def check_capped(
    kernels: Kernels,
    device: torch.device,
    shape: tuple[int, int, int, int, int, int],
    rule: Rule,
    seed: int,
    masked: bool = False,
) -> None:
    """Without sinks and heads inner in memory, then with sinks and heads outer."""
    batch, heads, groups, queries, keys, dim = shape
    dtype, cpu = kernels.dtype, torch.device("cpu")
    sizes = ((batch, queries, heads, dim), *[(batch, keys, groups, dim)] * 2)
    drawn = [draw(seed + at, *size, device=device) for at, size in enumerate(sizes)]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in drawn)
    mask = draw(seed + 3, queries, keys, device=device) < 0 if masked else None
    if mask is not None:
        mask[:, keys // 2] = True
    some = draw(seed + 4, heads, device=device) + 1
    given = {"scale": rule.scale or dim**-0.5, "softcap": rule.softcap, "window": rule.window}
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    inputs = [x.to(cpu, torch.float32) for x in (q, k, v)]
    for sinks, pair in ((None, (k, v)), (some, (k.contiguous(), v.contiguous()))):
        seen, other = (None if x is None else x.to(cpu) for x in (mask, sinks))
        wanted = PlainAttention()(*inputs, seen, rule=rule, sinks=other)
        found = kernels.attend_capped(q, *pair, **given, mask_TS=mask, sinks_Q=sinks)
        assert found.dtype == dtype
        apart = (found.to(cpu, torch.float32) - wanted).abs().max()
        assert apart < close, (seed, float(apart))
