"""The batch sampler against transformers' logits processors, chi-square, and rows of NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layersweep.errors import InputError
from layersweep.generate import sampling as ours
from layersweep.generate.request import Sampling
from layersweep.generate.sampling import Chosen, Sampler, check_sampling

CPU = torch.device("cpu")
PROMPT = (3, 1, 4, 1, 5)
# One of each warper, and all of them.
EACH = (
    Sampling(do_sample=True, top_k=0),
    Sampling(do_sample=True, top_k=7),
    Sampling(do_sample=True, top_k=0, temperature=0.4),
    Sampling(do_sample=True, top_k=0, top_p=0.7),
    Sampling(do_sample=True, top_k=0, min_p=0.1),
    Sampling(do_sample=True, top_k=0, repetition_penalty=1.8),
    Sampling(do_sample=True, top_k=20, temperature=1.7, top_p=0.9, min_p=0.02,
             repetition_penalty=0.6),
)  # fmt: skip


def sampler_of(*all_settings: Sampling, vocab: int, ids: tuple[int, ...] = PROMPT) -> Sampler:
    sampler = Sampler(vocab, len(all_settings), CPU)
    for slot, sampling in enumerate(all_settings):
        sampler.add(slot, sampling, ids)
    return sampler


def warped_by_transformers(logits: Tensor, sampling: Sampling, ids: tuple[int, ...]) -> Tensor:
    """As GenerationMixin composes its processors: those at their neutral values are left out."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(torch.tensor([ids]).expand(len(logits), -1), logits.clone())


def warped_by_us(logits: Tensor, all_settings: Sequence[Sampling], ids: tuple[int, ...]) -> Tensor:
    """The scores that tokens are drawn from."""
    seen: list[Tensor] = []
    draw = ours._draw

    def watched(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(scores)
        return draw(scores, uniform)

    sampler = sampler_of(*all_settings, vocab=logits.shape[-1], ids=ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_draw", watched)
        sampler.choose(logits, range(len(all_settings)))
    return seen[0]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "many equal logits"])
def test_scores_and_kept_tokens_are_transformers(ties: bool) -> None:
    """Each warper in a row of one batch, so that rows that do not ask for one are left alone."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(EACH), 500)
    if ties:  # as a head in bfloat16 gives them
        logits = logits.mul(4).round() / 4
    found = warped_by_us(logits, EACH, PROMPT)
    for row, sampling in enumerate(EACH):
        expected = warped_by_transformers(logits[row : row + 1], sampling, PROMPT)[0]
        if ties and sampling.top_p < 1:  # which of the equal ones stay is chance in transformers
            assert torch.equal(found[row].sort().values, expected.sort().values), sampling
        else:
            assert torch.equal(found[row], expected), sampling
    kept = found.isfinite().sum(-1).tolist()
    assert kept[:2] == [500, 8 if ties else 7] and kept[3] < 60


def test_a_small_top_p_is_greedy_also_among_equal_logits() -> None:
    """Also one that 1 - top_p rounds away."""
    logits = torch.tensor([[-200.0, 4.0, 4.0, -300.0, -200.0]]).expand(2, -1)
    small, tiny = (Sampling(do_sample=True, top_p=top_p) for top_p in (1e-6, 1e-9))
    sampler = sampler_of(small, tiny, vocab=5, ids=())
    for _ in range(20):
        assert sampler.choose(logits, [0, 1]).ids.tolist() == [1, 1]


def test_the_least_and_the_largest_random_number_choose_tokens_that_are_kept() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.3, -torch.inf]]).expand(2, -1)
    ids, lost = ours._draw(scores, torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64))
    assert ids.tolist() == [1, 3] and not lost.any()


values = st.builds(
    Sampling,
    do_sample=st.just(True),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.3, 3),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(values, min_size=1, max_size=4), st.integers(2, 30), st.integers(0, 2**16))
def test_any_settings_keep_what_transformers_keeps(
    mixed: list[Sampling], vocab: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = 4 * torch.randn(len(mixed), vocab)
    ids = tuple(id % vocab for id in PROMPT)
    found = warped_by_us(logits, mixed, ids)
    for row, sampling in enumerate(mixed):
        expected = warped_by_transformers(logits[row : row + 1], sampling, ids)[0]
        assert torch.equal(found[row], expected), sampling


@pytest.mark.parametrize("sampling", EACH, ids=lambda s: f"k{s.top_k} p{s.top_p} t{s.temperature}")
def test_draws_follow_transformers_distribution(sampling: Sampling) -> None:
    """8,000 draws of one step, each with a seed of its own. Under the right distribution,
    p < 1e-4 comes up once in 10,000 such tests; the seeds are fixed."""
    torch.manual_seed(1)
    draws, logits = 8_000, 1.5 * torch.randn(1, 30)
    expected = warped_by_transformers(logits.double(), sampling, PROMPT)[0].softmax(-1)
    sampler = sampler_of(*(replace(sampling, seed=seed) for seed in range(draws)), vocab=30)
    ids = sampler.choose(logits.expand(draws, -1), range(draws)).ids
    counts, kept = ids.bincount(minlength=30), expected > 0
    assert counts[~kept].sum() == 0
    assert chisquare(counts[kept], draws * expected[kept]).pvalue > 1e-4


def test_draws_of_one_seed_follow_the_distribution_and_do_not_depend_on_each_other() -> None:
    """Step after step of one sequence: pairs of consecutive tokens are as likely as they should
    be."""
    steps, logits = 3000, torch.tensor([[0.0, 1.0, -0.5]])
    sampler = sampler_of(Sampling(do_sample=True, seed=7), vocab=3)
    ids = torch.cat([sampler.choose(logits, [0]).ids for _ in range(steps)])
    alone = logits[0].double().softmax(-1)
    pairs = (ids[::2] * 3 + ids[1::2]).bincount(minlength=9)
    expected = torch.outer(alone, alone).flatten() * steps / 2
    assert chisquare(pairs, expected).pvalue > 1e-4


def rows_of(steps: int, vocab: int = 50) -> Tensor:
    return 2 * torch.randn(steps, vocab, generator=torch.Generator().manual_seed(5))


def test_a_seed_gives_its_tokens_in_any_row_of_any_batch() -> None:
    """Alone; in the last row among others that come and go; and preempted half way."""
    logits, own = rows_of(12), replace(EACH[-1], seed=2**63 + 11)
    sampler = sampler_of(own, vocab=50)
    alone = [int(sampler.choose(step[None], [0]).ids) for step in logits]

    sampler, batched = Sampler(50, 4, CPU), []
    sampler.add(2, own, PROMPT)
    for step, row in enumerate(logits):
        others = [slot for slot in (0, 1, 3) if step % (slot + 2)]
        for slot in others:
            sampler.add(slot, replace(EACH[(step + slot) % len(EACH)], seed=step), PROMPT)
        if step == 6:
            sampler.remove(2)
            sampler.add(2, own, (*PROMPT, *batched), generated=6)
        theirs = rows_of(len(others), 50) + step
        chosen = sampler.choose(torch.cat([theirs, row[None]]), [*others, 2])
        batched.append(int(chosen.ids[-1]))
        for slot in others:
            sampler.remove(slot)
    assert batched == alone
    assert len(set(alone)) > 4  # draws, and not one token over and over


def test_other_seeds_give_other_tokens() -> None:
    """Also seeds that differ by the generator's own step, which would be the same numbers later."""
    seeds = [0, 1, 2, -1, 0x9E3779B97F4A7C15, None, None]
    sampler = sampler_of(*(Sampling(do_sample=True, top_k=0, seed=s) for s in seeds), vocab=1000)
    flat = torch.zeros(len(seeds), 1000)
    ids = torch.stack([sampler.choose(flat, range(len(seeds))).ids for _ in range(8)])
    streams = {tuple(column.tolist()) for column in ids.T}
    assert len(streams) == len(seeds)
    assert len({stream[at : at + 7] for stream in streams for at in (0, 1)}) == 2 * len(seeds)


def test_greedy_rows_take_the_lowest_of_the_likeliest_and_report_the_logits_as_they_came() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, -2.0, 4.0], [0.0, -0.0, -1.0, 0.0, -9.0]])
    greedy = Sampling(logprobs=2)
    penalty = replace(greedy, repetition_penalty=2.0, logprobs=4)
    sampler = sampler_of(greedy, penalty, vocab=5, ids=(0, 1))
    chosen = sampler.choose(logits, [0, 1])
    assert chosen.ids.tolist() == [1, 0]
    logprobs = logits.log_softmax(-1)
    assert torch.allclose(chosen.logprobs, logprobs[[0, 1], [1, 0]])
    assert chosen.top_ids.tolist() == [[1, 2, 4, 0], [0, 1, 3, 2]]
    assert torch.allclose(chosen.top_logprobs, logprobs.gather(1, chosen.top_ids))


def test_the_penalty_counts_prompt_and_answer_and_a_slot_forgets_who_had_it() -> None:
    sampling, logits = Sampling(repetition_penalty=2.0), torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0]])
    sampler = sampler_of(sampling, vocab=5, ids=(0, 7))  # 7: an id that the head has no row for
    assert [int(sampler.choose(logits, [0]).ids) for _ in range(3)] == [1, 2, 3]
    sampler.remove(0)
    sampler.add(0, sampling, (1,))
    assert int(sampler.choose(logits, [0]).ids) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), *EACH], ids=str)
def test_a_broken_row_is_reported_and_its_neighbours_do_not_notice(
    bad: float, sampling: Sampling
) -> None:
    logits, seeded = rows_of(3), replace(sampling, seed=3, logprobs=1)
    chosen: list[Chosen] = []
    for value in (0.0, bad):
        logits[1, 20] = value
        chosen.append(sampler_of(seeded, seeded, seeded, vocab=50).choose(logits, [0, 1, 2]))
    assert chosen[1].broken.tolist() == [False, True, False] and not chosen[0].broken.any()
    assert int(chosen[1].ids[1]) == 0
    for name in ("ids", "logprobs", "top_ids", "top_logprobs"):
        without, beside = (getattr(one, name)[[0, 2]] for one in chosen)
        assert torch.equal(without, beside), name


def test_forbidden_tokens_are_no_fault_and_a_row_without_any_token_is_one() -> None:
    logits = torch.full((3, 6), -torch.inf)
    logits[0, 4] = -3.0
    logits[2] = torch.arange(6.0)
    cold = Sampling(do_sample=True, temperature=1e-44)  # 5 / 1e-44 is inf in float32
    sampler = sampler_of(Sampling(do_sample=True), Sampling(), cold, vocab=6)
    chosen = sampler.choose(logits, [0, 1, 2])
    assert chosen.broken.tolist() == [False, True, True]
    assert int(chosen.ids[0]) == 4 and float(chosen.logprobs[0]) == 0.0


def test_it_works_inside_a_sweep_and_outside() -> None:
    """Sweeps run in inference mode, whose tensors nothing may write to outside."""
    sampler, logits = Sampler(50, 2, CPU), rows_of(2)
    with torch.inference_mode():
        sampler.add(0, EACH[-1], PROMPT)
        sampler.choose(logits[:1], [0])
    sampler.choose(logits[:1], [0])
    sampler.add(1, EACH[-1], PROMPT)
    assert not sampler.choose(logits, [0, 1]).broken.any()


def test_a_greedy_batch_neither_sorts_nor_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_warp", "_draw", "penalized"):
        monkeypatch.setattr(ours, name, None)
    sampler = sampler_of(Sampling(), Sampling(), vocab=50)
    chosen = sampler.choose(rows_of(2), [1, 0])
    assert torch.equal(chosen.ids, rows_of(2).argmax(-1)) and chosen.top_ids.shape == (2, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0, "do_sample": True},
        {"temperature": float("inf"), "do_sample": True},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": ("end", "")},
        {"logprobs": -1},
        {"logprobs": 21},
    ],
    ids=str,
)
def test_a_value_that_nothing_can_be_chosen_by_is_refused_by_name(wrong: dict[str, object]) -> None:
    name = next(iter(wrong))
    with pytest.raises(InputError, match=f"^{name}: found"):
        check_sampling(Sampling(**wrong), vocab=100)  # type: ignore[arg-type]


def test_limits_themselves_are_allowed() -> None:
    widest = Sampling(1, True, 1e-3, 0, 1.0, 1.0, 0.01, -5, ("x",), True, 20)
    check_sampling(widest, vocab=20)
    check_sampling(Sampling(temperature=0.0), vocab=2)  # greedy: it changes nothing
    with pytest.raises(InputError, match="logprobs: found 3, needed 0 to 2"):
        check_sampling(Sampling(logprobs=3), vocab=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits_for_the_device() -> None:
    """Rows enter, leave and sample by every warper while synchronizing calls raise."""
    device, vocab = torch.device("cuda"), 32_000
    logits = torch.randn(len(EACH) + 1, vocab, device=device)
    sampler = Sampler(vocab, 16, device)
    sampler.add(15, Sampling(logprobs=3), PROMPT)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for slot, sampling in enumerate(EACH):
            sampler.add(slot, replace(sampling, seed=slot), PROMPT)
            chosen = sampler.choose(logits[: slot + 2], [15, *range(slot + 1)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(chosen.ids[0]) == int(logits[0].argmax()) and not chosen.broken.any()
