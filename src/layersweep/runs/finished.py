"""What a finished sweep measured, as one file: a run that was killed goes on behind it.

The numbers of whole tiles do not depend on which sweep they ride on, so a resumed run ends with
the bits of an undisturbed one. Nothing of a sweep under way is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from layersweep.runs.record import NEEDLE, PERPLEXITY, Part, Record

FORMAT = "layersweep.sweep/1"


@dataclass
class FinishedSweep:
    """The tiles of one sweep, and what it counted besides the numbers that the jobs hold.

    `cache_bits[job, arm]` = [bits stored, elements]; `nonfinite[arm]` = first bad layer; `gate` is
    the report of the gate that had passed.
    """

    parts: list[Part]
    cache_bits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    gate: dict[str, Any] | None = None

    def add(self, other: FinishedSweep) -> None:
        """Take over another sweep's tiles and counts."""
        self.parts += other.parts
        for key, counted in other.cache_bits.items():
            total = self.cache_bits.setdefault(key, [0.0, 0.0])
            total[0] += counted[0]
            total[1] += counted[1]
        for arm, layer in other.nonfinite.items():
            self.nonfinite[arm] = min(layer, self.nonfinite.get(arm, layer))
        self.gate = self.gate or other.gate


class DamagedSweep(Exception):
    """A file that does not hold what a finished sweep of this study holds."""


def pack(record: Record, sweep: FinishedSweep) -> bytes:
    """The file of a sweep of `record`: safetensors, everything else as JSON in its header."""
    arrays: dict[str, NDArray[Any]] = {}
    trials: list[dict[str, Any]] = []
    for part in sweep.parts:
        if part.job == PERPLEXITY:
            assert record.perplexity is not None
            arrays |= record.perplexity.arrays(part.first, part.count)
        elif part.job == NEEDLE:
            assert record.needle is not None
            trials += record.needle.verdicts(part.first, part.count)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts = {
        "parts": [asdict(part) for part in sweep.parts],
        "trials": trials,
        "cache_bits": [[*key, *counted] for key, counted in sweep.cache_bits.items()],
        "nonfinite": sweep.nonfinite,
        "gate": sweep.gate,
        "arrays_sha256": _digest(arrays),
    }
    return save(arrays, {"format": FORMAT, "facts": json.dumps(facts)})


def unpack(record: Record, data: bytes) -> FinishedSweep:
    """Put a sweep's numbers back into `record`. Raises DamagedSweep."""
    try:
        arrays, facts = load(data), _facts(data)
        parts = [Part(**part) for part in facts["parts"]]
        if _digest(arrays) != facts["arrays_sha256"]:
            raise DamagedSweep("its numbers do not have the hash that was written with them")
        unknown = [part for part in parts if part not in record.parts]
        if unknown:
            raise DamagedSweep(f"tile {unknown[0]} is none of this study's")
        for part in parts:
            if part.job == PERPLEXITY and record.perplexity:
                record.perplexity.restore(part.first, part.count, arrays)
        if record.needle:
            record.needle.restore(facts["trials"])
        bits = {(job, arm): [bits, elements] for job, arm, bits, elements in facts["cache_bits"]}
        return FinishedSweep(parts, bits, facts["nonfinite"], facts["gate"])
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as failure:
        raise DamagedSweep(f"{type(failure).__name__}: {failure}") from failure


def _facts(data: bytes) -> dict[str, Any]:
    """The JSON in the file's header, which `load` does not return."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])["__metadata__"]
    if header["format"] != FORMAT:
        raise DamagedSweep(f"found format {header['format']}, needed {FORMAT}")
    facts: dict[str, Any] = json.loads(header["facts"])
    return facts


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        hashed.update(arrays[name].tobytes())
    return hashed.hexdigest()
