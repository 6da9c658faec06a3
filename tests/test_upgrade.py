"""A results.json of an earlier version, read as this one would have written it.

tests/data/results-1.json is what `build_results(windows=12, per_depth=1, arms=STUDY[:2])` gave when
results.json was /1: the same simulated measurements as today's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results_builders import STUDY, build_results

from layersweep.errors import InputError
from layersweep.report.store import load_results
from layersweep.runs.compare import compare_runs

EARLIER = Path(__file__).parent / "data/results-1.json"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def today() -> Json:
    return build_results(windows=12, per_depth=1, arms=STUDY[:2])


def test_perplexity_is_what_this_version_makes_of_the_same_windows(today: Json) -> None:
    found, wanted = load_results(EARLIER)["perplexity"], today["perplexity"]
    identity = wanted["noise_floor"]["identity"]
    for noise in (identity, *identity["by_method"].values()):
        noise["rms"] = pytest.approx(noise["rms"])  # from mean and sd, not from the windows
    for entry in (wanted["baseline"], *wanted["arms"]):
        del entry["kv_bytes"]  # known when a study is prepared, not from its windows
    assert found == wanted


def test_needles_keep_their_counts_and_lose_what_haystacks_would_tell(today: Json) -> None:
    found, wanted = load_results(EARLIER)["needle"], today["needle"]
    assert found["groups"] is None
    for arm, new in zip(found["arms"], wanted["arms"], strict=True):
        assert arm == new | {"p_flip": None, "answer_nll_sem": None}
    assert [t | {"haystack": None} for t in wanted["trials"]] == found["trials"]


def test_runs_of_both_versions_can_be_compared(today: Json) -> None:
    compared = compare_runs(load_results(EARLIER), today)
    assert [(arm.arm, arm.equal) for arm in compared.arms] == [
        ("exact", 12), ("lloyd:K3V2", 12), ("lloyd:K4V2", 12),
    ]  # fmt: skip


def test_what_only_claims_to_be_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    broken = json.loads(EARLIER.read_text("utf-8"))
    del broken["perplexity"]["segments"]
    (tmp_path / "results.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"does not follow layersweep.results/1: .*segments"):
        load_results(tmp_path)
