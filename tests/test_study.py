"""Whole evaluations, small, but every part real; of the bundled model where training matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_study
import torch
from studies import needle_of, perplexity_of

import layersweep
from layersweep import api
from layersweep.environment import Budget
from layersweep.errors import InputError
from layersweep.kv.arms import EXACT, parse_arms
from layersweep.kv.stream import keys_and_values
from layersweep.report.store import validate
from layersweep.stream.rates import MACHINES
from layersweep.study.fitting import fitting_arms
from layersweep.study.forecast import forecast
from layersweep.study.run import Outcome, run_study
from layersweep.study.study import Study, prepare_study
from layersweep.sweep.model import Model
from layersweep.tasks.perplexity.task import exact_pair_fraction
from layersweep.tasks.settings import EvalSettings

BARE = "trellis:K3V2@fit=1@found=1"
SMALL = EvalSettings(
    kv="K3V2,e8:K3V2", segments=45, prefix=64, continuation=32, niah_contexts=(512,),
    niah_depths=(0.2, 0.8), niah_per_depth=1, text=str(tiny_study.text_file()),
)  # fmt: skip
TRAINED = replace(SMALL, segments=20)


@pytest.fixture(scope="module")
def model() -> Model:
    return layersweep.load("demo", device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return layersweep.load(str(tiny_study.model_folder()), device="cpu")


def measured(model: Model, settings: EvalSettings) -> tuple[Study, Outcome]:
    study = prepare_study(model, settings)
    return study, run_study(study)


@pytest.fixture(scope="module")
def one_sweep(tiny: Model) -> tuple[Study, Outcome]:
    return measured(tiny, SMALL)


@pytest.fixture(scope="module")
def trained(model: Model) -> Study:
    return measured(model, TRAINED)[0]


def same_numbers(a: Study, b: Study) -> bool:
    arms = perplexity_of(a).numbers.nll.keys() & perplexity_of(b).numbers.nll.keys()
    return all(
        np.array_equal(perplexity_of(a).numbers.nll[arm], perplexity_of(b).numbers.nll[arm])
        for arm in arms
    )


def test_several_sweeps_within_a_smaller_budget_give_the_same_bits(
    tiny: Model, one_sweep: tuple[Study, Outcome]
) -> None:
    study, outcome = one_sweep
    assert (outcome.sweeps, outcome.gate_sweeps, study.done.nonfinite) == (1, 0, {})
    assert outcome.bytes_read == sum(spec.stored_bytes for spec in tiny.specs)
    less = study.plan.device_bytes - study.plan.peaks["hidden states"] // 2
    for ram in (study.plan.placement.host_ring + 4 * 2**20, 2**30):
        small = replace(tiny, vram=Budget(less, "test"), ram=Budget(ram, "test"))
        again, several = measured(small, study.settings)
        assert several.sweeps >= 2
        assert same_numbers(study, again)
        assert needle_of(again).numbers.answer_nll == needle_of(study).numbers.answer_nll
        assert several.bytes_read == again.plan.bytes_to_read


def test_the_baseline_does_not_depend_on_the_arms(
    tiny: Model, one_sweep: tuple[Study, Outcome]
) -> None:
    arms = "K3V2,K4V2,e8:K3V2,K1V1,e8:K2V2@pb=1"
    five, _ = measured(tiny, replace(one_sweep[0].settings, kv=arms, tasks=("ppl",), gate="off"))
    assert same_numbers(one_sweep[0], five)
    for study in (one_sweep[0], five):
        assert np.array_equal(perplexity_of(study).numbers.control_delta["exact"], np.zeros(4))
        assert not perplexity_of(study).numbers.control_kl["exact"].any()


def test_one_bit_keys_are_worse_than_three(model: Model) -> None:
    study, _ = measured(model, replace(TRAINED, kv="K1V16,K3V16,K8V8", tasks=("ppl",), gate="off"))
    loss = {
        a: (n - perplexity_of(study).numbers.nll["exact"]).mean()
        for a, n in perplexity_of(study).numbers.nll.items()
    }
    assert loss["trellis:K1V16@fit=1@found=1"] > 3 * abs(loss["trellis:K3V16@fit=1@found=1"])
    assert loss["trellis:K1V16@fit=1@found=1"] > 0.01
    assert abs(loss["trellis:K8V8@fit=1@found=1"]) < 1e-3


def test_streaming_costs_more_than_prefill_and_its_control_is_zero(
    model: Model, trained: Study
) -> None:
    study, _ = measured(model, replace(TRAINED, kv=f"{BARE},e8:K3V2", cache_mode="streaming"))
    streamed, whole = perplexity_of(study).numbers, perplexity_of(trained).numbers
    assert np.abs(streamed.nll["exact"] - whole.nll["exact"]).max() < 1e-5
    assert np.array_equal(streamed.control_delta["exact"], np.zeros(4))
    for arm in (BARE, "e8:K3V2"):  # by KL: the loss of 20 short windows is noise
        assert streamed.kl[arm].mean() > 1.5 * whole.kl[arm].mean() > 0
        assert study.done.cache_bits["perplexity", arm][1] == 2 * 6 * 20 * 96 * 2 * 64


def test_generation_agrees_with_teacher_forcing(model: Model, trained: Study) -> None:
    study, outcome = measured(model, replace(TRAINED, niah_mode="generate", tasks=("niah",)))
    assert outcome.sweeps == 16
    for arm, hits in needle_of(study).numbers.correct.items():
        assert len(needle_of(study).numbers.outputs[arm]) == 2
        for text, trial, hit in zip(
            needle_of(study).numbers.outputs[arm], needle_of(study).trials, hits, strict=True
        ):
            assert hit == text.strip().startswith(trial.answer)
        # an arm whose every answer token is the argmax generates the answer
        for teacher, generated in zip(needle_of(trained).numbers.correct[arm], hits, strict=True):
            assert generated or not teacher
    assert sum(needle_of(study).numbers.correct["exact"]) >= 1


def test_python_interface_returns_the_schema(model: Model) -> None:
    results = layersweep.evaluate(
        model, kv=["K3V2@window=16"], tasks=["ppl"], segments=2, prefix=64, continuation=16,
        text=SMALL.text,
    )  # fmt: skip
    validate(results)
    arm = results["perplexity"]["arms"][0]
    assert arm["arm"] == "trellis:K3V2@fit=1@found=1@window=16"
    # 17 of 64 tokens exact at 16 bits, 47 at (3 + 2) / 2 and an 8-bit scale per 64; one mean and
    # level, the first token in the codec's coordinates, 6 bytes of a bit per token
    bits = 17 * 16 + 47 * 2.625 + 16 * 65 / 64 + 16 + 48 / 128
    assert arm["bits_per_element"] == pytest.approx(bits / 64)
    # 6 layers of keys and values, 2 heads x 64, in 16 bits
    assert results["perplexity"]["baseline"]["kv_bytes"] == {"4096": 3072.0, "32768": 3072.0}
    bits = (17 * 16 + 4079 * 2.625 + 16 * 65 / 64 + 16 + 4080 / 128) / 4096
    assert arm["kv_bytes"]["4096"] == pytest.approx(1536 * bits / 8)
    assert results["protocol"]["exact_pair_fraction"] == pytest.approx(120 / (120 + 15 * 64))
    assert exact_pair_fraction(1024, 512) == pytest.approx(0.2, abs=1e-3)


def test_a_slow_search_is_announced(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, kv="K3V2,e8:K3V2", tasks=("ppl",), gate="off")
    assert "encoder" not in str(prepare_study(tiny, settings).fallbacks)
    monkeypatch.setattr("layersweep.kv.trellis.encoder_name", lambda: "torch")
    monkeypatch.setattr("layersweep.study.fitting.numba_refusal", lambda: "numba is not installed")
    found = [f for f in prepare_study(tiny, settings).fallbacks if "encoder" in f.what]
    assert [(f.what, f.used, f.why) for f in found] == [
        (f"encoder of {BARE}", "plain torch, slower", "numba is not installed")
    ]


def test_arms_of_all_that_do_not_take_a_head_size_are_left_out_and_said() -> None:
    streams, cpu = keys_and_values(2, 80), torch.device("cpu")
    fitting, left_out = fitting_arms(parse_arms("all"), streams, cpu, torch.float32)
    names = [one.wanted for one in left_out]
    assert "int4" in names and "q8_0" in names
    assert BARE in [arm.name for arm in fitting]
    assert str(left_out[names.index("int4")]) == (
        "--kv all: wanted int4, used nothing: left out: int4: stream 'k' has head size 80, "
        "needed a multiple of 64"
    )
    assert len(fitting) + len(left_out) == len(parse_arms("all"))


@pytest.mark.parametrize(
    ("dim", "hint"), [(96, "@group=32"), (80, "trellis:K4V4 and fp8 take this head size")]
)
def test_a_hint_names_what_works(dim: int, hint: str) -> None:
    streams, cpu = keys_and_values(2, dim), torch.device("cpu")
    with pytest.raises(InputError, match=f"has head size {dim}, needed a multiple of 64") as no:
        fitting_arms(parse_arms("int4"), streams, cpu, torch.float32)
    assert no.value.hint == hint
    instead = f"int4{hint}" if "@" in hint else "trellis:K4V4,fp8"
    assert fitting_arms(parse_arms(instead), streams, cpu, torch.float32)[1] == []


def test_evaluate_takes_one_for_a_list_of_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[EvalSettings] = []

    def prepare(model: Model, settings: EvalSettings) -> Study:
        asked.append(settings)
        raise InterruptedError

    monkeypatch.setattr(api, "prepare_study", prepare)
    for given in (
        {"kv": "K3V2,K4V2", "tasks": "ppl", "niah_contexts": 512, "segments": "all"},
        {"kv": ["K3V2", "K4V2"], "tasks": ["ppl"], "niah_contexts": [512], "segments": None},
    ):
        with pytest.raises(InterruptedError):
            layersweep.evaluate(model, niah_depths=0.5, **given)  # type: ignore[arg-type]
    wanted = EvalSettings(
        kv="K3V2,K4V2", tasks=("ppl",), segments=None, niah_contexts=(512,), niah_depths=(0.5,)
    )
    assert asked == [wanted, wanted]
    for wrong, said in (
        ({"tasks": [1]}, "--tasks: found '1', needed ppl or niah"),
        ({"niah_contexts": 0.5}, "--niah-context: found '0.5', needed a whole number"),
        ({"segments": "many"}, "--segments: found 'many', needed a whole number"),
    ):
        with pytest.raises(InputError, match=said):
            layersweep.evaluate(model, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [EvalSettings(tasks=("ppl",)), EvalSettings(tasks=("niah",))])
def test_a_task_beyond_the_models_limit_is_refused_by_study_and_plan(
    model: Model, settings: EvalSettings
) -> None:
    decoder = replace(model.decoder, max_position_embeddings=1000)
    model = replace(model, checkpoint=replace(model.checkpoint, decoder=decoder))
    refusal = r"needed at most 1000, the model's limit \(max_position_embeddings in config.json\)"
    with pytest.raises(InputError, match=refusal):
        prepare_study(model, settings)
    with pytest.raises(InputError, match=refusal):
        forecast(decoder, model.specs, settings, [EXACT], MACHINES["t4"])
