"""One thread per process: most operations here are so short that two threads would spend their time
at barriers, and `make test` runs a process per core."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from families.checks import Subject

# Before torch is imported: with two threads a row of a product depends on how many there are.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The tiny model named by the parameter, and transformers' reading of it."""
    from families.checks import Subject
    from families.table import TINY
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tiny = TINY[request.param]
    if tiny.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {tiny.model_type}")
    return Subject.of(tiny, tmp_path_factory.mktemp("family"))
