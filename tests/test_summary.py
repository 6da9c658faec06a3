"""From raw measurements to the sections of results.json."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from results_builders import STUDY, build_results, simulate_needle, simulate_perplexity

from layersweep.report.sections import warnings
from layersweep.report.store import validate
from layersweep.runs.sections import reasons_not_publishable
from layersweep.tasks.needle.summary import summarize_needle
from layersweep.tasks.perplexity.measurements import ControlMeasurement
from layersweep.tasks.perplexity.summary import summarize_perplexity


@pytest.fixture(scope="module")
def measured():
    return simulate_perplexity()


@pytest.fixture(scope="module")
def section(measured):
    return summarize_perplexity(measured)


def arm_of(section, name):
    return next(arm for arm in section["arms"] if arm["arm"] == name)


def test_every_arm_figure_follows_from_its_windows(measured, section):
    for arm in section["arms"]:
        delta = measured.nll[arm["arm"]] - measured.nll["exact"]
        assert arm["mean_delta_nll"] == pytest.approx(delta.mean())
        assert arm["delta_percent"] == pytest.approx(100 * (math.exp(delta.mean()) - 1))
        assert arm["percent_mean_of_windows"] == pytest.approx((100 * (np.exp(delta) - 1)).mean())
        assert arm["ppl"] == pytest.approx(np.exp(measured.nll[arm["arm"]].mean()))
        assert arm["z"] == pytest.approx(arm["mean_delta_nll"] / arm["sem_iid"])
        assert arm["mde_percent"] == pytest.approx(280 * arm["sem"])
        assert arm["ci95"][0] < arm["mean_delta_nll"] < arm["ci95"][1]
        assert arm["sem"] > arm["sem_iid"]  # the simulation correlates neighbours
        assert arm["n_negative"] == (delta < 0).sum()


def test_compression_is_sixteen_over_the_measured_bits(section):
    assert arm_of(section, "lloyd:K3V2")["compression"] == pytest.approx(16 / 2.69)


def test_unknown_bits_stay_unknown(measured):
    section = summarize_perplexity(
        replace(measured, bits_per_element=measured.bits_per_element | {"e8:K3V2": None})
    )
    assert arm_of(section, "e8:K3V2")["bits_per_element"] is None
    assert arm_of(section, "e8:K3V2")["compression"] is None


def test_perplexity_ratio_equals_delta_percent(section):
    arm = section["arms"][0]
    ratio = arm["ppl"] / section["baseline"]["ppl"]
    assert 100 * (ratio - 1) == pytest.approx(arm["delta_percent"])


def test_holm_never_lowers_and_covers_all_arms(section):
    for arm in section["arms"]:
        assert arm["p_flip"] <= arm["p_holm"] <= 4 * arm["p_flip"]
    # losses of 2 SEM and more: no flip of the 100,000 that are drawn comes near
    assert max(arm["p_holm"] for arm in section["arms"]) == pytest.approx(4 / 100_001)
    assert max(pair["p"] for pair in section["pairs"]) < 0.05


def test_deltas_are_said_once(measured, section):
    for arm in section["arms"]:
        deltas = [segment["delta"][arm["arm"]] for segment in section["segments"]]
        assert deltas == (measured.nll[arm["arm"]] - measured.nll["exact"]).tolist()
        assert arm["n_worse"] == sum(delta > 0 for delta in deltas) == 80 - arm["n_negative"]
    articles = {window.article for window in measured.windows}
    assert section["groups"] == {"kind": "articles", "count": len(articles)}


def test_pairs_are_differences_of_arms(section):
    assert len(section["pairs"]) == 6
    means = {arm["arm"]: arm["mean_delta_nll"] for arm in section["arms"]}
    for pair in section["pairs"]:
        assert pair["mean_delta_nll"] == pytest.approx(means[pair["a"]] - means[pair["b"]])


def test_pairs_hold_the_ratio_of_losses_and_the_z_of_the_difference(section):
    means = {arm["arm"]: arm["mean_delta_nll"] for arm in section["arms"]}
    for pair in section["pairs"]:
        low, high = pair["loss_ratio_ci95"]
        assert pair["loss_ratio"] == pytest.approx(means[pair["a"]] / means[pair["b"]])
        assert low < pair["loss_ratio"] < high
        assert pair["z"] == pytest.approx(pair["mean_delta_nll"] / pair["sem"])


def test_a_pair_without_a_clear_loss_below_has_no_ratio(measured):
    noise = 0.002 * np.random.default_rng(0).standard_normal(len(measured.windows))
    lossless = measured.nll | {"e8:K4V2": measured.nll["exact"] + noise}
    pairs = summarize_perplexity(replace(measured, nll=lossless))["pairs"]
    for pair in pairs:
        unbounded = pair["b"] == "e8:K4V2"
        assert (pair["loss_ratio"] is None) == (pair["loss_ratio_ci95"] is None) == unbounded
        assert pair["z"] is not None


def test_noise_floor_names_the_worst_identity(measured):
    controls = {
        "exact": ControlMeasurement(np.zeros(4), np.zeros((4, 5), np.float32)),
        "identity:lloyd": ControlMeasurement(np.full(4, 0.001), np.zeros((4, 5), np.float32)),
        "identity:e8": ControlMeasurement(
            np.array([-0.004, -0.002, -0.003, -0.003]), np.full((4, 5), 0.5, np.float32)
        ),
    }
    section = summarize_perplexity(replace(measured, controls=controls))
    floor = section["noise_floor"]
    assert floor["exact"] == {"n": 4, "mean": 0.0, "sd": 0.0, "max": 0.0, "rms": 0.0, "kl": 0.0}
    assert floor["identity"]["mean"] == pytest.approx(-0.003)
    assert floor["identity"]["max"] == pytest.approx(0.004)
    assert floor["identity"]["kl"] == pytest.approx(0.5)
    assert floor["identity"]["by_method"]["lloyd"]["mean"] == pytest.approx(0.001)
    # e8:K4V2 lies at about 0.0055 < 2 x 0.003; lloyd:K3V2 at 0.0045 > 2 x 0.001
    assert arm_of(section, "e8:K4V2")["below_noise_floor"] is True
    assert arm_of(section, "lloyd:K3V2")["below_noise_floor"] is False


def test_a_control_whose_deltas_cancel_is_noise_all_the_same(measured):
    """+-0.004 on four windows: the mean is 0, an arm at 0.0045 is not above its noise."""
    deltas = np.array([0.004, -0.004, 0.004, -0.004])
    kl = np.zeros((4, 5), np.float32)
    controls = {
        "identity:lloyd": ControlMeasurement(deltas, kl),
        "identity:e8": ControlMeasurement(np.full(4, 0.001), kl),
    }
    section = summarize_perplexity(replace(measured, controls=controls))
    identity = section["noise_floor"]["identity"]
    assert (identity["mean"], identity["rms"]) == (0.0, pytest.approx(0.004))
    assert arm_of(section, "lloyd:K3V2")["below_noise_floor"] is True
    assert arm_of(section, "e8:K4V2")["below_noise_floor"] is False


@pytest.mark.parametrize("name", ["identity:lloyd", "exact"])
def test_a_control_that_is_not_finite_is_said_and_ends_no_run(measured, name):
    broken = ControlMeasurement(np.array([0.0, np.nan, 0.0, 0.0]), np.zeros((4, 5), np.float32))
    section = summarize_perplexity(
        replace(measured, controls=dict(measured.controls) | {name: broken})
    )
    json.dumps(section, allow_nan=False)
    floor = section["noise_floor"]
    nothing = {"n": 4} | dict.fromkeys(("mean", "sd", "max", "rms", "kl"))
    if name == "exact":
        assert floor["exact"] == nothing
        assert arm_of(section, "lloyd:K3V2")["below_noise_floor"] is False
    else:
        assert floor["identity"]["by_method"]["lloyd"] == nothing
        assert floor["identity"]["rms"] == floor["identity"]["by_method"]["e8"]["rms"] > 0
        assert arm_of(section, "lloyd:K3V2")["below_noise_floor"] is None
    results = build_results(tasks="ppl") | {"perplexity": section}
    validate(results)
    words = "identity, lloyd" if name != "exact" else "exact again"
    line = f"the control {words} gave non-finite values: its noise floor is unknown"
    assert line in warnings(results)


def test_without_controls_the_noise_floor_is_unknown(measured):
    section = summarize_perplexity(replace(measured, controls={}))
    assert section["noise_floor"] == {"exact": None, "identity": None}
    assert section["arms"][0]["below_noise_floor"] is None


def test_nonfinite_arm_is_dropped_from_every_comparison(measured):
    broken = measured.nll["e8:K3V2"].copy()
    broken[3] = np.nan
    section = summarize_perplexity(
        replace(
            measured,
            nll=measured.nll | {"e8:K3V2": broken},
            status=measured.status | {"e8:K3V2": "nonfinite"},
        )
    )
    arm = arm_of(section, "e8:K3V2")
    assert arm["status"] == "nonfinite"
    assert (arm["ppl"], arm["sem"], arm["kl_mean"], arm["p_holm"]) == (None, None, None, None)
    assert len(section["pairs"]) == 3
    assert section["segments"][3]["nll"]["e8:K3V2"] is None
    assert section["segments"][4]["nll"]["e8:K3V2"] == broken[4]
    json.dumps(section, allow_nan=False)
    reasons = reasons_not_publishable(
        status="complete", weights="nf4", measured={"perplexity": section, "needle": None}
    )
    assert reasons == ["e8:K3V2 gave non-finite values"]


def test_one_window_of_one_arm_has_nulls_and_follows_the_schema():
    results = build_results(windows=1, arms=STUDY[:1], tasks="ppl")
    arm = results["perplexity"]["arms"][0]
    assert (arm["sem"], arm["sem_iid"], arm["z"], arm["ci95"]) == (None, None, None, None)
    assert arm["n"] == 1
    assert results["perplexity"]["lag1"] is None
    validate(results)


def test_underpowered_below_sixty_windows():
    short = summarize_perplexity(simulate_perplexity(windows=59))
    enough = summarize_perplexity(simulate_perplexity(windows=60))
    assert (short["underpowered"], enough["underpowered"]) == (True, False)


def test_needle_counts_lost_and_gained():
    measured = simulate_needle(per_depth=1, arms=STUDY[:1])
    correct = {
        "exact": [True] * 8 + [False] * 2,
        "lloyd:K3V2": [False] * 3 + [True] * 5 + [True, False],
    }
    nll = {"exact": [0.1] * 10, "lloyd:K3V2": [0.2, 0.3] * 5}
    section = summarize_needle(replace(measured, correct=correct, answer_nll=nll))
    exact, arm = section["arms"]
    assert (exact["correct"], exact["n"], exact["lost"]) == (8, 10, None)
    assert (arm["correct"], arm["lost"], arm["gained"]) == (6, 3, 1)
    # haystacks lie apart: McNemar's p is 2 (1 + 4) / 16, and the mid-p has half of 2 x 4 / 16 less
    assert arm["p_mcnemar_iid"] == pytest.approx(0.625)
    assert arm["p_flip"] == pytest.approx(0.375)
    assert arm["answer_nll_delta"] == pytest.approx(0.15)
    assert arm["answer_nll_sem"] == pytest.approx(0.05 / 3)
    assert arm["wilson95"] == pytest.approx([0.3127, 0.8318], abs=1e-4)
    assert section["baseline_gate"] == "passed"  # 8 of 10 is exactly 80 %
    assert section["spot_check"] is True
    assert [cell["correct"] for cell in arm["by_depth"]] == [0] * 3 + [1] * 6 + [0]


def test_needles_in_one_stretch_of_the_text_count_as_one():
    """Ten needles in pairs: five stretches, one of which loses both of its needles."""
    measured = simulate_needle(per_depth=1, arms=STUDY[:1])
    trials = [
        replace(trial, haystack_begin=64_000 * (i // 2), haystack_end=64_000 * (i // 2) + 16_000)
        for i, trial in enumerate(measured.trials)
    ]
    correct = {"exact": [True] * 10, "lloyd:K3V2": [False] * 2 + [True] * 8}
    nll = {"exact": [0.1] * 10, "lloyd:K3V2": [0.2, 0.2, 0.3, 0.3] * 2 + [0.2, 0.2]}
    section = summarize_needle(replace(measured, trials=trials, correct=correct, answer_nll=nll))
    arm = section["arms"][1]
    assert section["groups"] == {"kind": "stretches", "count": 5}
    assert (arm["lost"], arm["p_mcnemar_iid"], arm["p_flip"]) == (2, 0.5, 0.5)
    # means 0.1, 0.2, 0.1, 0.2, 0.1 of five stretches: sqrt(0.012 / 4) / sqrt(5)
    assert arm["answer_nll_sem"] == pytest.approx(math.sqrt(0.003 / 5))
    one = [replace(trial, haystack_begin=0, haystack_end=16_000) for trial in measured.trials]
    alone = summarize_needle(replace(measured, trials=one, correct=correct, answer_nll=nll))
    assert (alone["arms"][1]["answer_nll_sem"], alone["arms"][1]["p_flip"]) == (None, 0.5)


def test_needle_gate_fails_below_eighty_percent():
    measured = simulate_needle(per_depth=6, baseline=0.5, arms=STUDY[:1])
    section = summarize_needle(measured)
    assert section["baseline_gate"] == "failed"
    assert section["spot_check"] is False
    reasons = reasons_not_publishable(
        status="complete", weights="nf4", measured={"perplexity": None, "needle": section}
    )
    assert reasons == ["the exact cache finds fewer than 80 % of the needles"]


def test_generate_mode_without_answer_nll():
    measured = replace(simulate_needle(per_depth=1, arms=STUDY[:1], mode="generate"), answer_nll={})
    section = summarize_needle(measured)
    assert section["arms"][1]["answer_nll_delta"] is None
    assert section["trials"][0]["answer_nll"] == {}


def test_by_depth_adds_up_over_contexts():
    section = summarize_needle(simulate_needle(per_depth=3, contexts=(1024, 4096)))
    for arm in section["arms"]:
        assert len(arm["by_depth"]) == 20
        assert sum(cell["correct"] for cell in arm["by_depth"]) == arm["correct"]
        assert sum(cell["n"] for cell in arm["by_depth"]) == arm["n"] == 60


def test_what_a_run_lacks_to_be_published():
    results = build_results(windows=20, per_depth=2)
    assert results["publishable"] is False
    assert results["reasons"] == [
        "20 perplexity windows, 60 are needed",
        "20 needles are a spot check, 60 are needed",
    ]
    assert build_results()["publishable"] is True
    synthetic = build_results(weights="synthetic", tasks="ppl")
    assert synthetic["reasons"] == ["the weights are synthetic"]
    assert reasons_not_publishable(
        status="gate_failed", weights="nf4", measured={"perplexity": None, "needle": None}
    ) == ["the run is not complete (status: gate_failed)", "nothing was measured"]
