"""kernel-metadata.json and dataset-metadata.json, as the kaggle client 2.2.5 reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from layersweep.errors import InputError

LONGEST_TITLE = 50  # of a kernel and of a dataset
T4X2 = "NvidiaTeslaT4"  # Kaggle's name for two of them
LONGEST_SUFFIX = len("-rehearse")  # "-stage-99" is as long
_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)/([a-z0-9]+(?:-[a-z0-9]+)*)")


@dataclass(frozen=True)
class Id:
    """--id USER/SLUG: what the ids of all kernels and of the wheels begin with."""

    user: str
    slug: str

    @staticmethod
    def parse(text: str) -> Id:
        """Raises InputError for what Kaggle would refuse, or would rename."""
        match = _ID.fullmatch(text)
        longest = LONGEST_TITLE - LONGEST_SUFFIX
        if match is None or len(match[2]) > longest:
            slug = re.sub(r"[^a-z0-9]+", "-", text.rpartition("/")[2].lower()).strip("-")
            raise InputError(
                f"--id: found '{text}', needed USER/SLUG, SLUG of at most {longest} lower-case "
                "letters and digits with single dashes between",
                hint=f"--id {text.partition('/')[0] if '/' in text else 'USER'}/"
                f"{slug[:longest].strip('-') or 'kv-study'}",
            )
        return Id(match[1], match[2])

    def __str__(self) -> str:
        return f"{self.user}/{self.slug}"

    def of(self, job: str) -> str:
        """ "me/study-run" of job "run"."""
        return f"{self.user}/{self.slug}-{job}"

    def title(self, job: str) -> str:
        """Kaggle makes a slug of the title and wants it to be the id's."""
        return f"{self.slug}-{job}".replace("-", " ")


@dataclass(frozen=True)
class Sources:
    """What a kernel mounts, by kind."""

    datasets: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)


def kernel_metadata(
    ident: Id, job: str, sources: Sources, *, gpu: bool, internet: bool
) -> dict[str, Any]:
    """The fields of one private script. Internet is on where the field is missing, so it never
    is."""
    return {
        "id": ident.of(job),
        "title": ident.title(job),
        "code_file": "kernel.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": gpu,
        "enable_tpu": False,
        "enable_internet": internet,
        **({"machine_shape": T4X2} if gpu else {}),
        "dataset_sources": sources.datasets,
        "competition_sources": [],
        "kernel_sources": sources.kernels,
        "model_sources": sources.models,
    }


def dataset_metadata(ident: Id) -> dict[str, Any]:
    """Of the wheelhouse. The licence is layersweep's own."""
    return {
        "id": ident.of("wheels"),
        "title": ident.title("wheels"),
        "licenses": [{"name": "Apache 2.0"}],
    }
