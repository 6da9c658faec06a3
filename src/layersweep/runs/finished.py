"""What a finished sweep measured, as one file: a run that was killed continues after it.

The numbers of whole tiles do not depend on which sweep they ride on, so a resumed run ends with
the bits of an undisturbed one. Nothing of a sweep under way is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from layersweep.runs.record import Json, Record, TileKey
from layersweep.tasks.task import Stored

FORMAT = "layersweep.sweep/2"
SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # quotes within the facts are escaped
UNSEALED = "0" * 64


@dataclass
class FinishedSweep:
    """The tiles of one sweep, and what it counted besides the numbers of its tasks.

    `cache_bits[task, arm]` = [bits stored, elements]; `nonfinite[arm]` = first bad layer; `gate` is
    the report of the gate that had passed.
    """

    tiles: list[TileKey]
    cache_bits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    gate: dict[str, Any] | None = None

    def add(self, other: FinishedSweep) -> None:
        """Take over another sweep's tiles and counts."""
        self.tiles += other.tiles
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
    rows: dict[str, list[Json]] = {}
    for tile in sweep.tiles:
        stored = record.numbers[tile.task].stored(tile.first, tile.count)
        arrays |= {f"{tile.task}/{tile.first}/{name}": of for name, of in stored.arrays.items()}
        rows[_row_key(tile)] = stored.rows
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts = {
        "tiles": [asdict(tile) for tile in sweep.tiles],
        "rows": rows,
        "cache_bits": [[*key, *counted] for key, counted in sweep.cache_bits.items()],
        "nonfinite": sweep.nonfinite,
        "gate": sweep.gate,
    }
    return sealed(save(arrays, {"format": FORMAT, "facts": json.dumps(facts), "sha256": UNSEALED}))


def sealed(data: bytes) -> bytes:
    """The file with the hash of all its bytes in its header, where they count as zeros. Raises
    DamagedSweep where it has no place for one."""
    if (seal := SEAL.search(data)) is None:
        raise DamagedSweep("found no hash in its header")
    start, stop = seal.span(1)
    blank = data[:start] + UNSEALED.encode() + data[stop:]
    return data[:start] + hashlib.sha256(blank).hexdigest().encode() + data[stop:]


def unpack(record: Record, data: bytes) -> FinishedSweep:
    """Put a sweep's numbers back into `record`. Raises DamagedSweep."""
    if sealed(data) != data:
        raise DamagedSweep("its bytes do not have the hash that was written with them")
    try:
        arrays, facts = load(data), _facts(data)
        tiles = [TileKey(**tile) for tile in facts["tiles"]]
        unknown = [tile for tile in tiles if tile not in record.tiles]
        if unknown:
            raise DamagedSweep(f"tile {unknown[0].words} is none of this study's")
        for tile in tiles:
            start = f"{tile.task}/{tile.first}/"
            own = {n.removeprefix(start): of for n, of in arrays.items() if n.startswith(start)}
            stored = Stored(own, facts["rows"][_row_key(tile)])
            record.numbers[tile.task].restore(tile.first, tile.count, stored)
        bits = {(task, arm): [bits, elements] for task, arm, bits, elements in facts["cache_bits"]}
        return FinishedSweep(tiles, bits, facts["nonfinite"], facts["gate"])
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as failure:
        raise DamagedSweep(f"{type(failure).__name__}: {failure}") from failure


def _row_key(tile: TileKey) -> str:
    return f"{tile.task} {tile.first}"


def _facts(data: bytes) -> dict[str, Any]:
    """The JSON in the file's header, which `load` does not return."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])["__metadata__"]
    if header["format"] != FORMAT:
        raise DamagedSweep(f"found format {header['format']}, needed {FORMAT}")
    facts: dict[str, Any] = json.loads(header["facts"])
    return facts
