"""The bundled model: our NLL per window and per-arm deltas against transformers, whose cache is
overwritten by decode(encode) before the continuation is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_models import Prefilled, codec_of, oracle_model, prefilled, scored_with_cache
from studies import needle_of, perplexity_of
from torch import Tensor

from layersweep.study.run import run_study
from layersweep.study.study import Study, prepare_study
from layersweep.sweep.model import load
from layersweep.tasks.settings import EvalSettings

DEMO = Path(__file__).parents[1] / "src/layersweep/demo/model"
ARMS = "lloyd:K3V2,lloyd:K4V2,e8:K3V2,e8:K4V2,e8:K3V2@v=0.5,lloyd:K2V2@pb=1"
WINDOWS, CONTINUATION = 2, 256


@pytest.fixture(scope="module")
def study() -> Study:
    settings = EvalSettings(
        kv=ARMS, segments=WINDOWS, continuation=CONTINUATION,
        niah_contexts=(2048,), niah_depths=(0.5,), niah_per_depth=1,
    )  # fmt: skip
    prepared = prepare_study(load("demo", device="cpu"), settings)
    run_study(prepared)
    return prepared


@pytest.fixture(scope="module")
def oracle() -> torch.nn.Module:
    return oracle_model(DEMO)


@dataclass(frozen=True)
class Asked:
    """A window or a needle as transformers continues it: its prefix once, for all arms."""

    prefix: Prefilled
    branch: list[int]
    exact: Tensor  # log-probabilities of branch[1:]

    @classmethod
    def of(cls, oracle: object, prefix: Sequence[int], branch: Sequence[int]) -> Asked:
        kept = prefilled(oracle, list(prefix))
        return cls(kept, list(branch), scored_with_cache(oracle, kept, list(branch), None))


@pytest.fixture(scope="module")
def windows(study: Study, oracle: object) -> list[Asked]:
    return [
        Asked.of(oracle, window.ids[: window.prefix], window.ids[window.prefix :])
        for window in perplexity_of(study).windows
    ]


@pytest.fixture(scope="module")
def needle(study: Study, oracle: object) -> Asked:
    trial = needle_of(study).trials[0]
    return Asked.of(oracle, trial.prefix_ids, trial.branch_ids)


def test_baseline_nll_of_every_window_equals_transformers(study: Study, oracle: object) -> None:
    for window, ours in zip(
        perplexity_of(study).windows, perplexity_of(study).numbers.nll["exact"], strict=True
    ):
        ids = torch.tensor([window.ids])
        with torch.inference_mode():
            logits = oracle(ids).logits[0, window.prefix : -1]
        target = ids[0, window.prefix + 1 :]
        theirs = torch.nn.functional.cross_entropy(logits, target).item()
        assert abs(ours - theirs) < 1e-4


@pytest.mark.parametrize("name", ARMS.split(","))
def test_delta_of_every_window_equals_transformers(
    name: str, study: Study, oracle: object, windows: list[Asked]
) -> None:
    job = perplexity_of(study)
    for index, asked in enumerate(windows):
        scores = scored_with_cache(oracle, asked.prefix, asked.branch, codec_of(name, 6))
        delta = asked.exact.double().mean().item() - scores.double().mean().item()
        ours = job.numbers.nll[name][index] - job.numbers.nll["exact"][index]
        assert abs(ours - delta) < 1e-4
        assert abs(ours) > 1e-5


@pytest.mark.parametrize("name", ("exact", *ARMS.split(",")[:4]))
def test_needle_answer_nll_equals_transformers(
    name: str, study: Study, oracle: object, needle: Asked
) -> None:
    scores = needle.exact
    if name != "exact":
        scores = scored_with_cache(oracle, needle.prefix, needle.branch, codec_of(name, 6))
    answer = scores[-needle_of(study).trials[0].answer_length :]
    ours = needle_of(study).numbers.answer_nll[name][0]
    assert abs(ours - -answer.double().mean().item()) < 1e-4


def test_exact_control_is_zero_and_deltas_are_not(study: Study) -> None:
    job = perplexity_of(study)
    assert np.array_equal(job.numbers.control_delta["exact"], np.zeros(WINDOWS))
    scored = (WINDOWS, CONTINUATION - 1)
    assert np.array_equal(job.numbers.control_kl["exact"], np.zeros(scored, np.float32))
    for method in ("lloyd", "e8"):
        assert 0 < np.abs(job.numbers.control_delta[f"identity:{method}"]).max() < 1e-5


def test_e8_equals_the_published_package(
    study: Study, oracle: object, windows: list[Asked]
) -> None:
    """nexusquant-kv 0.6.3 itself, where it is installed (pip install --no-deps nexusquant-kv)."""
    nexusquant = pytest.importorskip("nexusquant", reason="nexusquant-kv is not installed")

    def compress(cache: object) -> None:
        nexusquant.compress_kv_cache(
            cache, mode="quant_only", rope_base=1e6, key_bits=3, value_bits=2
        )

    job = perplexity_of(study)
    for index, asked in enumerate(windows):
        scores = scored_with_cache(oracle, asked.prefix, asked.branch, None, compress)
        delta = asked.exact.double().mean().item() - scores.double().mean().item()
        ours = job.numbers.nll["e8:K3V2"][index] - job.numbers.nll["exact"][index]
        assert abs(ours - delta) < 1e-4
