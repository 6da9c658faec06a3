"""What an opened checkpoint is: named weights, each a stored tensor and perhaps its scales."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layersweep.checkpoint.header import FLOAT_NAMES, StoredTensor
from layersweep.families.spec import Decoder

SHORT_NAMES = {"bfloat16": "bf16"}


@dataclass(frozen=True)
class Nested:
    """Scales of the scales: absmax F32 [ceil((skip + blocks) / blocksize)], quant_map F32 [256].

    `skip`: scales in the first nested block that belong to the weight before this one, where both
    are slices of fused experts.
    """

    absmax: StoredTensor
    quant_map: StoredTensor
    blocksize: int
    offset: float
    skip: int = 0


@dataclass(frozen=True)
class Quant:
    """4-bit storage. absmax: F32 [blocks], or U8 [blocks] where `nested`.

    `stored_dtype` is the dtype under which the packed bytes lie in the file (usually "U8").
    `other_nbytes` counts companions that are checked at opening and never read again.
    """

    kind: Literal["nf4", "fp4"]
    blocksize: int
    absmax: StoredTensor
    nested: Nested | None
    stored_dtype: str
    other_nbytes: int


@dataclass(frozen=True)
class Weight:
    """One weight under its canonical name; `shape` is the dense one, `data` as stored.
    `transposed`: the file has columns of the matrix where it has rows (floats only)."""

    name: str
    shape: tuple[int, ...]
    data: StoredTensor
    quant: Quant | None
    transposed: bool = False

    @property
    def kind(self) -> str:
        """ "nf4", "fp4", "bfloat16", "float16" or "float32"."""
        return self.quant.kind if self.quant else FLOAT_NAMES[self.data.dtype]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """What is read whenever the weight is: its data, then its scales."""
        quant = self.quant
        if quant is None:
            return (self.data,)
        if quant.nested is None:
            return (self.data, quant.absmax)
        return (self.data, quant.absmax, quant.nested.absmax, quant.nested.quant_map)

    @property
    def nbytes(self) -> int:
        """All bytes in the file, companions included. Slices of fused experts each count the
        scales of scales that they share."""
        checked_once = self.quant.other_nbytes if self.quant else 0
        return sum(tensor.nbytes for tensor in self.stored) + checked_once

    def describe(self) -> str:
        """ "nf4 1x16384" (packed bytes) or "float16 8x4096"."""
        shape = (1, self.data.nbytes) if self.quant else self.shape
        return f"{self.kind} {'x'.join(map(str, shape))}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were checked; no weight was read.

    weights: canonical name -> Weight, see families/weights.py. fingerprint: sha256 over file names,
    sizes, headers and config.json. nbytes: all weight bytes. notes: oddities that were read, for
    people. unused_fields: of config.json, that nothing looks at. unused_files: in the same folder,
    that nothing reads.
    """

    source: str
    revision: str | None
    folder: Path
    decoder: Decoder
    weights: dict[str, Weight]
    files: tuple[Path, ...]
    fingerprint: str
    nbytes: int
    notes: tuple[str, ...]
    unused_fields: tuple[str, ...]
    unused_files: tuple[str, ...]

    @property
    def router_kind(self) -> str:
        """How the routers are stored: "nf4", "float16", ..., "mixed"; "" in a dense model."""
        routers = [name for name in self.weights if name.endswith(".router")]
        return _one(self.weights[name].kind for name in routers) if routers else ""

    @property
    def storage(self) -> str:
        """ "nf4, router float16"."""
        router = f", router {self.router_kind}" if self.router_kind else ""
        return f"{self.weights_kind}{router}"

    @property
    def weights_kind(self) -> str:
        """How projections are stored: "nf4", "bf16", "float16", "float32", "mixed"."""
        matrices = {name: one for name, one in self.weights.items() if len(one.shape) == 2}
        named = [one.kind for name, one in matrices.items() if name.endswith("_proj")]
        kind = _one(named or [one.kind for one in matrices.values()])
        return SHORT_NAMES.get(kind, kind)


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a 4-bit weight: two elements each, the last one padded."""
    return (math.prod(shape) + 1) // 2


def _one(kinds: Iterable[str]) -> str:
    distinct = set(kinds)
    return distinct.pop() if len(distinct) == 1 else "mixed"
