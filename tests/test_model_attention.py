"""Attention rules on the CPU, against transformers' eager functions."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family_builders import SMALL, tensors_of, written
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from layersweep.errors import InputError
from layersweep.families import spec
from layersweep.kernels import KernelError
from layersweep.model import attention as attentions
from layersweep.model import compute, fused, maths
from layersweep.model.attention import (
    PLAIN,
    FlashAttention,
    MemoryEfficientAttention,
    PlainAttention,
    Rule,
    TritonAttention,
    attend_one,
)
from layersweep.model.compute import choose_compute, on_cpu
from layersweep.model.ops import TorchOps
from layersweep.sweep import model as models
from layersweep.sweep.model import load

HEADS, KV_HEADS, DIM, VALUE = 6, 2, 24, 16
RULES = {
    "plain": Rule(),
    "scale": Rule(scale=0.1),
    "window": Rule(window=5),
    "window of one": Rule(window=1),
    "softcap": Rule(softcap=2.0),
    "gemma2": Rule(scale=0.4, window=7, softcap=1.5),
}


def inputs(
    queries: int, keys: int, dim: int = DIM, value: int = DIM, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, HEADS, queries, dim),
        torch.randn(batch, KV_HEADS, keys, dim),
        torch.randn(batch, KV_HEADS, keys, value) / 2,
    )


def eager(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, sinks: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """What transformers' own code makes of it, in float64, with a mask spelled out in full."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is None:
        query_at = torch.arange(keys - queries, keys)[:, None]
        behind = query_at - torch.arange(keys)
        mask = (behind >= 0) & (behind < (rule.window or keys))
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    module = SimpleNamespace(
        num_key_value_groups=HEADS // KV_HEADS, training=False,
        sinks=None if sinks is None else sinks.double(), head_dim=q.shape[-1],
    )  # fmt: skip
    args = (module, q.double(), k.double(), v.double(), bias)
    scaling = rule.scale or q.shape[-1] ** -0.5
    if sinks is not None:
        found, _ = modeling_gpt_oss.eager_attention_forward(*args, scaling=scaling)
    else:
        found, _ = modeling_gemma2.eager_attention_forward(
            *args, scaling=scaling, softcap=rule.softcap
        )
    return found.transpose(1, 2).float()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries, keys", [(1, 1), (20, 20), (7, 20), (1, 20), (5, 5), (3, 6)])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_transformers_own(name: str, queries: int, keys: int) -> None:
    q, k, v = inputs(queries, keys)
    close(PlainAttention()(q, k, v, rule=RULES[name]), eager(q, k, v, RULES[name], None))


@pytest.mark.parametrize("queries, keys", [(20, 20), (7, 20), (1, 20)])
@pytest.mark.parametrize("name", ["plain", "scale", "window"])
def test_sinks_are_those_of_gpt_oss(name: str, queries: int, keys: int) -> None:
    q, k, v = inputs(queries, keys)
    sinks = torch.randn(HEADS) + 2
    found = PlainAttention()(q, k, v, rule=RULES[name], sinks=sinks)
    close(found, eager(q, k, v, RULES[name], sinks))
    assert (found - PlainAttention()(q, k, v, rule=RULES[name])).abs().max() > 0.05


@pytest.mark.parametrize("dim, value", [(DIM, VALUE), (VALUE, DIM)])
@pytest.mark.parametrize("name", RULES)
def test_value_heads_of_another_size(name: str, dim: int, value: int) -> None:
    q, k, v = inputs(7, 20, dim, value)
    found = PlainAttention()(q, k, v, rule=RULES[name])
    assert found.shape == (2, HEADS, 7, value)
    close(found, eager(q, k, v, RULES[name], None))


@pytest.mark.parametrize(
    "name, with_sinks",
    [("plain", False), ("scale", False), ("softcap", False), ("plain", True), ("scale", True)],
)
def test_a_mask_replaces_the_causal_rule(name: str, with_sinks: bool) -> None:
    sinks = torch.linspace(-1, 3, HEADS) if with_sinks else None
    q, k, v = inputs(7, 20)
    mask = torch.rand(7, 20) < 0.5
    mask[:, 3] = True
    found = PlainAttention()(q, k, v, mask, rule=RULES[name], sinks=sinks)
    close(found, eager(q, k, v, RULES[name], sinks, mask))


def test_softcap_with_sinks_is_a_softmax_over_capped_scores_and_the_sink() -> None:
    q, k, v = inputs(1, 3)
    sinks, rule = torch.randn(HEADS), Rule(scale=0.5, softcap=1.5)
    found = PlainAttention()(q, k, v, rule=rule, sinks=sinks)
    for head in range(HEADS):
        keys, values = k[1, head // 3], v[1, head // 3]
        scores = 1.5 * torch.tanh(keys @ q[1, head, 0] * 0.5 / 1.5)
        powers = scores.exp()
        wanted = (powers[:, None] * values).sum(0) / (powers.sum() + sinks[head].exp())
        close(found[1, head, 0], wanted)


@pytest.mark.parametrize("queries, keys", [(20, 20), (7, 20)])
def test_a_window_that_holds_all_keys_is_none(queries: int, keys: int) -> None:
    q, k, v = inputs(queries, keys)
    plain = PlainAttention()
    assert torch.equal(plain(q, k, v, rule=Rule(window=keys)), plain(q, k, v))
    assert not torch.equal(plain(q, k, v, rule=Rule(window=keys - 1)), plain(q, k, v))


def test_scores_of_long_sequences_are_held_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(50, 60)
    sinks, rule = torch.randn(HEADS), Rule(window=11, softcap=2.0)
    whole = PlainAttention()(q, k, v, rule=rule, sinks=sinks)
    sizes: list[int] = []
    real = maths.attend_by_scores

    def counted(q: Tensor, k: Tensor, *rest: object) -> Tensor:
        sizes.append(4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return real(q, k, *rest)

    monkeypatch.setattr(attentions.maths, "attend_by_scores", counted)
    bound = 4 * 2 * HEADS * 60 * 8
    monkeypatch.setattr(attentions, "SCORE_BYTES", bound)
    close(PlainAttention()(q, k, v, rule=rule, sinks=sinks), whole)
    assert len(sizes) == 7 and max(sizes) <= bound
    assert sizes[-1] == 4 * 2 * HEADS * 2 * 12  # two queries see 11 + 1 keys between them


@pytest.mark.parametrize("name", ["plain", "scale", "softcap"])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 3, HEADS)])
@pytest.mark.parametrize("value", [DIM, VALUE])
def test_one_query_over_keys_with_a_bias(name: str, sinks: Tensor | None, value: int) -> None:
    q, k, v = inputs(1, 20, value=value)
    seen = torch.rand(2, 20) < 0.5
    seen[:, 3] = True
    bias = torch.zeros(2, 20).masked_fill(~seen, float("-inf"))
    found = attend_one(q[:, :, 0], k, v, bias, RULES[name], sinks)
    assert found.shape == (2, HEADS, value)
    plain = PlainAttention()
    for row in range(2):
        one = slice(row, row + 1)
        wanted = plain(q[one], k[one], v[one], seen[one], rule=RULES[name], sinks=sinks)
        close(found[one], wanted[:, :, 0])


def test_a_window_beside_a_mask_is_never_dropped_in_silence() -> None:
    q, k, v = inputs(7, 20)
    mask = torch.ones(7, 20, dtype=torch.bool)
    with pytest.raises(AssertionError, match="a window must be part of the mask"):
        PlainAttention()(q, k, v, mask, rule=Rule(window=5))
    with pytest.raises(AssertionError, match="a window must be part of the bias"):
        attend_one(q[:, :, 0], k, v, torch.zeros(2, 20), Rule(window=5))
    kept = PlainAttention()(q, k, v, mask, rule=Rule(window=5).masked())
    close(kept, eager(q, k, v, PLAIN, None, mask))


def test_what_a_gpu_cannot_do_is_known_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    capped, narrow = Rule(softcap=50.0), Rule(scale=0.1, window=128)
    plain, efficient, flash = PlainAttention(), MemoryEfficientAttention(), FlashAttention()
    ours = TritonAttention()
    monkeypatch.setattr(attentions, "_has_triton", lambda: True)
    monkeypatch.setattr(attentions, "load_nvrtc", lambda: None)
    for attention in (plain, efficient, flash, ours):
        assert attention.refusal(narrow, 192) is None and attention.refusal(capped, 256) is None
    assert plain.refusal(capped, 512) is None and efficient.refusal(narrow, 512) is None
    limit = "takes heads of a multiple of 8 up to 256 numbers, not"
    assert flash.refusal(narrow, 512) == ours.refusal(capped, 512) == f"flash attention {limit} 512"
    assert efficient.refusal(capped, 12) == f"the kernel for capped scores (softcap) {limit} 12"
    monkeypatch.setattr(attentions, "_has_triton", lambda: False)
    why = "capped scores (softcap) need Triton, which is not installed"
    assert flash.refusal(capped, 128) == why and flash.refusal(narrow, 128) is None
    with pytest.raises(AssertionError, match="need Triton"):
        flash(*inputs(3, 3), rule=capped)


@pytest.mark.parametrize("capability", [(9, 0), (12, 0), (8, 9)])
def test_without_triton_torch_attends_and_the_run_says_so(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "_kernel_ops", lambda *_: (TorchOps(), ()))
    monkeypatch.delitem(sys.modules, "layersweep.kernels.flash_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    device, half = torch.device("cuda"), torch.float16
    made = choose_compute(device, half, assume_capability=capability)
    assert isinstance(made.attention, FlashAttention)
    told = [one[:3] for one in made.fallbacks]
    wanted = ("attention", "flash, in Triton", "torch's flash, slower")
    assert told == ([wanted] if capability >= (9, 0) else [])
    single = choose_compute(device, torch.float32, assume_capability=capability)
    assert isinstance(single.attention, MemoryEfficientAttention) and not single.fallbacks


def test_torchs_flash_serves_as_many_queries_as_keys_and_ours_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "flash", lambda *_: "torch's")
    monkeypatch.setattr(attentions, "_in_triton", lambda *_: "ours")
    attention, past = TritonAttention(), (torch.empty(2, KV_HEADS, 5, DIM),) * 2
    square, branch = inputs(20, 20), inputs(7, 20)
    assert attention(*square) == attention(*square, rule=Rule(scale=0.1)) == "torch's"
    assert attention(*square, rule=Rule(window=20)) == "torch's"  # it hides nothing
    assert attention(*square, rule=Rule(window=19)) == "ours"
    assert attention(*square, rule=Rule(softcap=50.0)) == "ours"
    assert attention(*square, sinks=torch.zeros(HEADS)) == "ours"
    assert attention(*square, torch.ones(20, 20, dtype=torch.bool)) == "ours"
    assert attention(*square, past=past) == attention(*branch) == "ours"


@pytest.mark.parametrize("name", ["plain", "window", "gemma2"])
def test_a_result_goes_where_it_is_wanted(name: str) -> None:
    q, k, v = inputs(7, 20)
    memory = torch.full((2, 9, HEADS, v.shape[-1]), float("nan"))
    out = memory.transpose(1, 2)[:, :, 1:8]
    assert PlainAttention()(q, k, v, rule=RULES[name], out=out) is out
    assert torch.equal(out, PlainAttention()(q, k, v, rule=RULES[name]))
    assert memory[:, [0, 8]].isnan().all()


@pytest.mark.parametrize("name", ["plain", "window", "gemma2"])
def test_a_past_is_what_comes_before(name: str) -> None:
    q, k, v = inputs(7, 20)
    plain, past, own = PlainAttention(), (k[:, :, :12], v[:, :, :12]), (k[:, :, 12:], v[:, :, 12:])
    assert torch.equal(
        plain(q, *own, past=past, rule=RULES[name]), plain(q, k, v, rule=RULES[name])
    )


def raise_missing() -> None:
    raise KernelError("no libnvrtc")


def test_without_nvrtc_an_older_gpu_caps_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentions, "load_nvrtc", raise_missing)
    efficient = MemoryEfficientAttention()
    assert efficient.refusal(Rule(softcap=50.0), 128) == (
        "capped scores (softcap) need a kernel that cannot be compiled here: no libnvrtc"
    )
    assert efficient.refusal(PLAIN, 128) is None


def test_the_rule_of_a_layer() -> None:
    layer = spec.Attention(8, 2, 64, 64, scale=0.125, rope=None)
    assert Rule.of(layer) == PLAIN  # the usual scale is left to the kernel
    gemma = spec.Attention(8, 4, 256, 256, scale=0.05, rope=None, window=4096, softcap=50.0)
    assert Rule.of(gemma) == Rule(0.05, 4096, 50.0)


def test_a_layer_that_the_device_cannot_attend_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2, whose scores are capped, on an sm_75 without NVRTC."""
    fields = {**SMALL, "model_type": "gemma2", "head_dim": 8, "sliding_window": 16}
    folder = written(tmp_path, fields, tensors_of("gemma2", fields))
    assert load(folder, device="cpu").paths.attention == PlainAttention.name
    older = replace(on_cpu(), attention=MemoryEfficientAttention())
    monkeypatch.setattr(models, "choose_compute", lambda *_, **__: older)
    monkeypatch.setattr(attentions, "load_nvrtc", raise_missing)
    with pytest.raises(InputError) as caught:
        load(folder, device="cpu")
    assert str(caught.value) == (
        "layer 0 (GQA 4/2 x 8, window 16, softcap 50, RoPE 10000): found a device whose attention "
        "is memory-efficient, needed another: capped scores (softcap) need a kernel that cannot be "
        "compiled here: no libnvrtc"
    )


GPU_RULES = ("plain", "scale", "window")


@pytest.mark.parametrize("attention", [FlashAttention(), MemoryEfficientAttention()])
def test_torchs_kernels_take_our_arguments(attention: attentions.Attention) -> None:
    """Without a GPU: they check arguments and shapes on the meta device too."""
    sizes = ((2, HEADS, 7, DIM), (2, KV_HEADS, 20, DIM), (2, KV_HEADS, 20, VALUE))
    q, k, v = (torch.empty(size, dtype=torch.float16, device="meta") for size in sizes)
    mask = torch.empty(7, 20, dtype=torch.bool, device="meta")
    out = torch.empty(2, 7, HEADS, VALUE, dtype=torch.float16, device="meta").transpose(1, 2)
    for name in GPU_RULES:
        for sinks in (None, torch.empty(HEADS, device="meta")):
            found = attention(q, k, v, rule=RULES[name], sinks=sinks)
            assert found.shape == (2, HEADS, 7, VALUE) and found.dtype == torch.float16
            assert attention(q, k, v, rule=RULES[name], sinks=sinks, out=out) is out
            found = attention(q, k, v, mask, rule=RULES[name].masked(), sinks=sinks)
            assert found.shape == (2, HEADS, 7, VALUE)


def test_a_sink_takes_its_share_afterwards() -> None:
    q, k, v = inputs(20, 20)
    sinks = torch.randn(HEADS) + 1
    scores = q @ k.repeat_interleave(HEADS // KV_HEADS, dim=1).mT * DIM**-0.5
    hidden = ~torch.ones(20, 20, dtype=torch.bool).tril()
    sums = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    padded = torch.nn.functional.pad(sums, (0, 12), value=float("nan"))
    found = fused.with_sinks(PlainAttention()(q, k, v), padded, sinks)
    close(found, PlainAttention()(q, k, v, sinks=sinks))
