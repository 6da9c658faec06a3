"""Every attention rule on a real GPU, against the oracle on the CPU in float32.

python -m pytest -m gpu tests/test_attention_gpu.py
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from layersweep.model.attention import (
    Attention,
    FlashAttention,
    MemoryEfficientAttention,
    PlainAttention,
    Rule,
    TritonAttention,
    attend_one,
    choose_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda:0")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Largest difference from the oracle, for values of about 1: probabilities are rounded too.
CLOSE = {HALF: 4e-3, BRAIN: 3e-2, SINGLE: 5e-5}
PAIRS: list[tuple[Attention, torch.dtype]] = [
    (FlashAttention(), HALF), (MemoryEfficientAttention(), HALF),
    (MemoryEfficientAttention(), SINGLE), (TritonAttention(), HALF),
]  # fmt: skip
RULES = {
    "plain": Rule(),
    "scale": Rule(scale=0.05),
    "window": Rule(window=128),
    "window of one": Rule(window=1),
    "odd window": Rule(scale=0.05, window=77),
    "softcap": Rule(softcap=5.0),
    "gemma2": Rule(scale=0.06, window=100, softcap=5.0),
}
# (query heads, key heads, T, S, D of a key, D of a value): prefix, branch, one token; MLA; Gemma;
# 7 heads that share keys, and a few tokens behind many. Every second one has sinks. Triton compiles
# for each combination of heads, head size, sinks, past, window and cap: a second each.
SHAPES = [
    (8, 2, 300, 300, 128, 128), (8, 8, 100, 421, 64, 64), (8, 2, 1, 200, 128, 128),
    (4, 4, 130, 333, 192, 128), (4, 2, 200, 457, 256, 256), (6, 3, 70, 150, 80, 80),
    (14, 2, 24, 1500, 64, 64),
]  # fmt: skip


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**31)
    torch.manual_seed(chosen)
    print(f"seed {chosen}")
    return chosen


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As a sweep has them: heads are the inner dimension in memory."""
    heads, kv_heads, queries, keys, dim, value = shape
    sizes = ((queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value))
    q, k, v = (torch.randn(2, *size).to(DEVICE, dtype).transpose(1, 2) for size in sizes)
    return 2 * q, k, v


def oracle(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, sinks: Tensor | None
) -> Tensor:
    q, k, v = (x.float().cpu() for x in (q, k, v))
    mask, sinks = (None if x is None else x.cpu() for x in (mask, sinks))
    return PlainAttention()(q, k, v, mask, rule=rule, sinks=sinks)


def same(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    apart = (found.float().cpu() - wanted).abs()
    assert apart.max() < CLOSE[dtype] and apart.mean() < CLOSE[dtype] / 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attention, dtype", PAIRS, ids=lambda one: getattr(one, "name", str(one)))
def test_rules(
    attention: Attention, dtype: torch.dtype, name: str, shape: tuple[int, ...], seed: int
) -> None:
    rule = RULES[name]
    if rule.softcap is not None and shape[4] != shape[5]:
        return  # no model does that
    q, k, v = inputs(shape, dtype)
    sinks = torch.randn(shape[0], device=DEVICE) + 1 if SHAPES.index(shape) % 2 else None
    with sdpa_kernel(list(attention.backends)):
        found = attention(q, k, v, rule=rule, sinks=sinks)
    same(found, oracle(q, k, v, None, rule, sinks), dtype)


@pytest.mark.parametrize("before", [1, 120, 203])
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], SHAPES[6]], ids=str)
@pytest.mark.parametrize("name", ["plain", "window", "window of one", "odd window", "gemma2"])
def test_a_past_that_lies_elsewhere(
    name: str, shape: tuple[int, ...], before: int, seed: int
) -> None:
    """Of any length up to where the queries' own keys begin, laid as a codec lays it."""
    attention, rule = TritonAttention(), RULES[name]
    if rule.softcap is not None and shape[4] != shape[5]:
        return
    q, k, v = inputs(shape, HALF)
    past = k[:, :, :before].contiguous(), v[:, :, :before].contiguous()
    sinks = torch.randn(shape[0], device=DEVICE)
    own = k[:, :, before:], v[:, :, before:]
    found = attention(q, *own, past=past, rule=rule, sinks=sinks)
    same(found, oracle(q, k, v, None, rule, sinks), HALF)
    memory = torch.full((2, shape[2] + 2, shape[0], shape[5]), 7.0, dtype=HALF, device=DEVICE)
    out = memory.transpose(1, 2)[:, :, 1:-1]
    attention(q, *own, past=past, rule=rule, sinks=sinks, out=out)
    assert torch.equal(out, found) and memory[:, [0, -1]].eq(7).all()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", ["plain", "scale", "softcap"])
@pytest.mark.parametrize("attention, dtype", PAIRS, ids=lambda one: getattr(one, "name", str(one)))
def test_masks(
    attention: Attention, dtype: torch.dtype, name: str, with_sinks: bool, seed: int
) -> None:
    rule = RULES[name]
    q, k, v = inputs((8, 2, 100, 333, 128, 128), dtype)
    mask = torch.rand(100, 333, device=DEVICE) < 0.1
    mask[:, 300] = True
    sinks = torch.randn(8, device=DEVICE) + 1 if with_sinks else None
    with sdpa_kernel(list(attention.backends)):
        found = attention(q, k, v, mask, rule=rule, sinks=sinks)
    same(found, oracle(q, k, v, mask, rule, sinks), dtype)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", ["plain", "scale", "softcap"])
@pytest.mark.parametrize("attention, dtype", PAIRS, ids=lambda one: getattr(one, "name", str(one)))
def test_one_query_with_a_bias(
    attention: Attention, dtype: torch.dtype, name: str, with_sinks: bool, seed: int
) -> None:
    q, k, v = inputs((8, 2, 1, 336, 128, 128), dtype)
    hidden = torch.rand(2, 336, device=DEVICE) < 0.5
    hidden[:, 300] = False
    bias = torch.zeros(2, 336, dtype=dtype, device=DEVICE).masked_fill_(hidden, float("-inf"))
    sinks = torch.randn(8, device=DEVICE) + 1 if with_sinks else None
    with sdpa_kernel(list(attention.backends)):
        found = attend_one(q[:, :, 0], k, v, bias, RULES[name], sinks)
    for row in range(2):
        one, seen = slice(row, row + 1), ~hidden[row : row + 1]
        wanted = oracle(q[one], k[one], v[one], seen, RULES[name], sinks)
        same(found[one], wanted[:, :, 0], dtype)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_the_plain_rule_computes_what_it_did(dtype: torch.dtype, seed: int) -> None:
    q, k, v = inputs((8, 2, 300, 300, 128, 128), dtype)
    repeated = k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1)
    flash = FlashAttention()
    with sdpa_kernel(list(flash.backends)):
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert torch.equal(flash(q, k, v), wanted)
    efficient = MemoryEfficientAttention()
    with sdpa_kernel(list(efficient.backends)):
        wanted = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
        assert torch.equal(efficient(q, k, v), wanted)
    branch = q[:, :, :100]
    wanted = torch.ops.aten._scaled_dot_product_flash_attention(branch, k, v, is_causal=True)[0]
    assert torch.equal(flash(branch, k, v), wanted)
    for attention in (flash, efficient):
        assert torch.equal(attention(branch, k, v, rule=Rule(window=300)), attention(branch, k, v))


@pytest.mark.parametrize("dim, name", [(128, "plain"), (64, "odd window"), (256, "gemma2")])
def test_a_sequences_numbers_are_its_own(dim: int, name: str, seed: int) -> None:
    """Whatever else shares its launch: placement must not change results."""
    q, k, v = inputs((8, 2, 150, 400, dim, dim), BRAIN)

    def attended(some: slice) -> Tensor:
        past, own = ((k[some, :, at], v[some, :, at]) for at in (slice(250), slice(250, None)))
        return TritonAttention()(q[some], *own, past=past, rule=RULES[name])

    both = attended(slice(0, 2))
    same(both, oracle(q, k, v, None, RULES[name], None), BRAIN)
    for one in (slice(0, 1), slice(1, 2)):
        assert torch.equal(attended(one), both[one])


def test_no_error_above_torchs(seed: int) -> None:
    q, k, v = inputs((8, 2, 500, 1000, 128, 128), HALF)
    wanted = oracle(q, k, v, None, Rule(), None)
    ours, theirs = (
        (attention(q, k, v).float().cpu() - wanted).abs().mean()
        for attention in (TritonAttention(), FlashAttention())
    )
    assert ours < 1.05 * theirs


@pytest.mark.parametrize(
    "name, with_sinks", [("window", False), ("scale", True), ("window", True), ("gemma2", False)]
)
@pytest.mark.parametrize("attention, dtype", PAIRS, ids=lambda one: getattr(one, "name", str(one)))
def test_scores_are_never_written(
    attention: Attention, dtype: torch.dtype, name: str, with_sinks: bool, seed: int
) -> None:
    """8 heads of 8192 x 8192 scores would take 1 GiB in 16 bits, for each of two sequences."""
    q, k, v = inputs((8, 2, 8192, 8192, 128, 128), dtype)
    sinks = torch.randn(8, device=DEVICE) if with_sinks else None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = attention(q, k, v, rule=RULES[name], sinks=sinks)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 * found.nbytes


@pytest.mark.parametrize(
    "attention", [FlashAttention(), MemoryEfficientAttention(), TritonAttention()]
)
def test_capped_scores_at_full_length_and_any_stride(attention: Attention, seed: int) -> None:
    """Rows at both ends of a long sequence, over keys that lie as a cache holds them."""
    q, k, v = inputs((4, 2, 4096, 4096, 256, 256), BRAIN)
    for kept, rule in itertools.product(
        ((k, v), (k.contiguous(), v.contiguous())),
        (RULES["softcap"], Rule(softcap=50.0, window=512)),
    ):
        found = attention(q, *kept, rule=rule)
        for rows in (slice(0, 64), slice(4032, 4096)):
            seen = slice(0, rows.stop)
            wanted = oracle(q[:, :, rows], k[:, :, seen], v[:, :, seen], None, rule, None)
            same(found[:, :, rows], wanted, BRAIN)


def test_the_kernel_is_chosen_by_capability() -> None:
    names = [
        type(choose_attention(DEVICE, dtype, capability))
        for capability in ((7, 5), (8, 0), (9, 0))
        for dtype in (HALF, SINGLE)
    ]
    older = [MemoryEfficientAttention] * 2
    assert names == [*older, FlashAttention, older[0], TritonAttention, older[0]]
