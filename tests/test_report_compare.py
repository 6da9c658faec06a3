"""`layersweep report` and `layersweep compare`, and the pairing beneath."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import typer
from results_builders import STUDY, build_results
from typer.testing import CliRunner

from layersweep.cli.report import compare, report
from layersweep.errors import InputError
from layersweep.report.store import load_results, write_results
from layersweep.runs.compare import compare_runs


@cache
def _run():
    return build_results(arms=STUDY[:2])


@pytest.fixture
def run():
    return copy.deepcopy(_run())


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(report)
    app.command()(compare)

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def shift(results, arm, nats):
    for segment in results["perplexity"]["segments"]:
        segment["nll"][arm] += nats
    return results


def test_a_run_against_itself_is_exactly_equal(run):
    found = compare_runs(run, copy.deepcopy(run))
    assert found.common == 80
    assert [entry.arm for entry in found.arms] == ["exact", "lloyd:K3V2", "lloyd:K4V2"]
    for entry in found.arms:
        assert (entry.paired.mean, entry.equal, entry.largest) == (0.0, 80, 0.0)


def test_windows_are_paired_by_hash_not_by_position(run):
    other = shift(copy.deepcopy(run), "lloyd:K3V2", 0.002)
    other["perplexity"]["segments"].reverse()
    del other["perplexity"]["segments"][:10]
    found = compare_runs(run, other)
    assert (found.common, found.windows) == (70, (80, 70))
    exact, changed, _ = found.arms
    assert exact.equal == 70
    assert changed.paired.mean == pytest.approx(0.002)
    assert changed.paired.delta_percent == pytest.approx(0.2002, abs=1e-4)


def test_arms_of_one_run_only_are_named(run):
    other = copy.deepcopy(run)
    other["perplexity"]["arms"].pop()
    found = compare_runs(run, other)
    assert (found.only_first, found.only_second) == (("lloyd:K4V2",), ())


def test_a_nonfinite_arm_is_not_compared(run):
    other = copy.deepcopy(run)
    other["perplexity"]["arms"][0]["status"] = "nonfinite"
    assert [entry.arm for entry in compare_runs(run, other).arms] == ["exact", "lloyd:K4V2"]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "model",
            "fingerprint",
            "e" * 64,
            "model.fingerprint: ffffffffffff\u2026 and eeeeeeeeeeee",
        ),
        ("model", "weights", "bf16", "model.weights: nf4 and bf16"),
        ("protocol", "prefix", 512, "protocol.prefix: 1024 and 512"),
        ("protocol", "cache_mode", "streaming", "protocol.cache_mode: prefill and streaming"),
        ("protocol", "dtype", "float16", "protocol.dtype: float32 and float16"),
    ],
)
def test_what_differs_is_refused_by_name(run, section, key, value, message):
    other = copy.deepcopy(run)
    other[section][key] = value
    with pytest.raises(InputError, match=message):
        compare_runs(run, other)


def test_runs_without_common_windows_or_perplexity_are_refused(run):
    other = copy.deepcopy(run)
    for segment in other["perplexity"]["segments"]:
        segment["tokens_sha"] += "x"
    with pytest.raises(InputError, match="share no window"):
        compare_runs(run, other)
    with pytest.raises(InputError, match="the second run has no perplexity"):
        compare_runs(run, run | {"perplexity": None})


def test_report_prints_each_format(run, tmp_path, command):
    write_results(tmp_path, run)
    plain = command("report", tmp_path)
    assert plain.exit_code == 0
    assert "lloyd:K3V2" in plain.stdout
    assert command("report", tmp_path, "--format", "md").stdout.count("| lloyd:K3V2 |") == 2
    assert command("report", tmp_path, "--format", "csv").stdout.count("\n") == 81
    assert command("report", tmp_path, "--format", "csv-arms").stdout.count("\n") == 3
    assert r"\toprule" in command("report", tmp_path, "--format", "latex").stdout
    html = command("report", tmp_path, "--format", "html")
    assert html.stdout.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert command("report", tmp_path, "--format", "pdf").exit_code == 2


def test_compare_prints_both_runs(run, tmp_path, command):
    write_results(tmp_path / "a", run)
    write_results(tmp_path / "b", shift(copy.deepcopy(run), "lloyd:K4V2", -0.001))
    out = command("compare", tmp_path / "a", tmp_path / "b").stdout
    line = next(line for line in out.splitlines() if line.startswith("lloyd:K4V2"))
    assert "-0.1" in line
    assert "80 common windows of 80 and 80" in out
    assert load_results(tmp_path / "a") == run


def test_missing_run_is_an_input_error(tmp_path, command):
    result = command("report", tmp_path / "nowhere")
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
