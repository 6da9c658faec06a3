"""What the numbers of a run belong to. Two runs with equal manifests give equal numbers.

Budgets are not in it: where weights wait and how many sweeps it takes changes no number.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

import layersweep
from layersweep.environment import device_facts, versions
from layersweep.runs.versions import METRICS_VERSION
from layersweep.study.study import Study

SCHEMA = "layersweep.manifest/1"
PACKAGE = Path(layersweep.__file__).parent
CODE = (".py", ".cu", ".cuh", ".safetensors")


def manifest_of(study: Study) -> dict[str, Any]:
    """Flat: every value is compared, and named where it differs."""
    model, settings = study.model, study.settings
    found = versions()
    device, threads = device_facts(str(model.compute.device)), torch.get_num_threads()
    asked = {name: value for name, value in vars(settings).items() if name not in ("kv", "text")}
    return {
        "schema": SCHEMA,
        "metrics_version": METRICS_VERSION,
        "checkpoint fingerprint": model.checkpoint.fingerprint,
        "weights": model.weights,
        "text sha256": study.text.sha256,
        "tokenizer sha256": study.tokenizer.sha256,
        "tokens sha256": _tokens_sha256(study),
        "arms": [f"{arm.name} version {arm.codec_version}" for arm in study.arms],
        **{name.replace("_", "-"): _plain(value) for name, value in asked.items()},
        "dtype": str(model.compute.dtype).removeprefix("torch."),
        "router-dtype": model.router_dtype,
        "paths": vars(model.paths),
        "device": device["name"] if not model.cpu else f"{device['name']}, {threads} threads",
        "layersweep": found.get("layersweep"),
        "code sha256": code_sha256(PACKAGE),
        "torch": found.get("torch"),
        "cuda": found.get("cuda"),
    }


@cache
def code_sha256(package: Path) -> str:
    """sha256 over what computes: names and bytes of the package's code and tables.

    Not the commit: git may be absent or refuse to answer, and a page of docs changes no number.
    """
    hashed = hashlib.sha256()
    files = (path for path in package.rglob("*") if path.suffix in CODE)
    for name, path in sorted((path.relative_to(package).as_posix(), path) for path in files):
        if not name.startswith("demo/"):  # a model and a text, which have hashes of their own
            hashed.update(f"{name}\0{path.stat().st_size}\0".encode())
            hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _tokens_sha256(study: Study) -> str:
    hashed = hashlib.sha256()
    for tile in study.tiles:
        hashed.update(f"{tile.name} {tile.first} {tile.rows}\n".encode())
        hashed.update(tile.ids().astype("<i8").tobytes())
    return hashed.hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
