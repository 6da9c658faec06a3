"""Families with routed experts beside transformers, as test_families.py has the others; a file of
their own, since a file goes to one process."""

from __future__ import annotations

import pytest
from families.checks import TOLERANCE, Subject, complaints, exact, nf4
from families.experts import EXPERTS
from families.table import CHANGED, parameters

changing = pytest.mark.parametrize("family", parameters(EXPERTS, CHANGED), indirect=True)
each = pytest.mark.parametrize("family", parameters(EXPERTS), indirect=True)


@each
def test_losses_equal_transformers(family: Subject) -> None:
    assert exact(family).largest < TOLERANCE


@changing
def test_a_changed_field_moves_the_losses_as_transformers_do(family: Subject) -> None:
    assert complaints(family) == []


@each
def test_experts_as_nf4(family: Subject) -> None:
    assert nf4(family) < TOLERANCE
