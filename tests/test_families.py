"""Every family of decoders beside transformers: float32 losses of windows and of a needle.

    pytest -m families      all the variants of tests/families/table.py, with their fields changed
"""

from __future__ import annotations

import pytest
from families.changes import unknown
from families.checks import TOLERANCE, Subject, changed, exact, generated, nf4, through_arm
from families.small import read_fields
from families.table import CORE, EXPERTS, TINY

ATTENTION_KINDS = {
    "full": "qwen2",
    "window": "mistral",
    "softcap": "gemma2",
    "sinks": "gpt_oss",
    "q and k norm": "qwen3",
    "part of the head": "glm4",
    "two thetas": "gemma3_text",
    "latent": "deepseek_v2",
}


def parameters(names: object) -> list[object]:
    return [
        name if name in CORE else pytest.param(name, marks=pytest.mark.families) for name in names
    ]


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.of(request.param, tmp_path_factory.mktemp("family"))


each = pytest.mark.parametrize("subject", parameters(TINY), indirect=True)


@each
def test_losses_equal_transformers(subject: Subject) -> None:
    found = exact(subject)
    assert found.prefill < TOLERANCE
    assert found.streaming < TOLERANCE
    assert found.needle < TOLERANCE


@each
def test_a_changed_field_moves_the_losses_as_transformers_do(subject: Subject) -> None:
    assert unknown(read_fields(subject.folder)) == []
    complaints = [one.complaint(subject.tiny) for one in changed(subject)]
    assert [complaint for complaint in complaints if complaint] == []


@pytest.mark.parametrize("subject", parameters(EXPERTS), indirect=True)
def test_experts_as_nf4(subject: Subject) -> None:
    assert nf4(subject) < TOLERANCE


@pytest.mark.parametrize("arm", ["lloyd:K3V2", "e8:K4V2"])
@pytest.mark.parametrize("subject", ATTENTION_KINDS.values(), ids=ATTENTION_KINDS, indirect=True)
def test_an_arm_equals_transformers_with_an_overwritten_cache(subject: Subject, arm: str) -> None:
    difference, effect = through_arm(subject, arm)
    assert difference < TOLERANCE
    assert effect > 1e-3


@pytest.mark.parametrize("subject", ATTENTION_KINDS.values(), ids=ATTENTION_KINDS, indirect=True)
def test_a_token_at_a_time_equals_transformers(subject: Subject) -> None:
    assert generated(subject) < TOLERANCE
