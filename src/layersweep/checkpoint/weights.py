"""What an opened checkpoint is: named weights, each with the tensors that it lies in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.storage import Storage
from layersweep.families.spec import Decoder

SHORT_NAMES = {"bfloat16": "bf16"}


@dataclass(frozen=True)
class Weight:
    """One weight under its canonical name; `shape` is the dense one."""

    name: str
    shape: tuple[int, ...]
    storage: Storage

    @property
    def kind(self) -> str:
        """ "nf4", "bfloat16", ..."""
        return self.storage.kind

    @property
    def data(self) -> StoredTensor:
        return self.storage.stored[0]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """What is read whenever the weight is: its data, then its scales."""
        return self.storage.stored

    @property
    def nbytes(self) -> int:
        """All bytes in the file, companions included. Slices of fused experts each count the
        scales of scales that they share."""
        return sum(tensor.nbytes for tensor in self.stored) + self.storage.other_nbytes

    def describe(self) -> str:
        """ "nf4 1x16384" (packed bytes) or "float16 8x4096"."""
        shape = (1, self.data.nbytes) if self.storage.block > 1 else self.shape
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
    def kinds(self) -> dict[str, tuple[int, int]]:
        """{"q4_k": (weights, bytes), ...} of all weights but a tied head, the most bytes first."""
        found: dict[str, tuple[int, int]] = {}
        distinct = {weight.storage: weight for weight in self.weights.values()}
        for weight in distinct.values():
            count, nbytes = found.get(weight.kind, (0, 0))
            found[weight.kind] = count + 1, nbytes + weight.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def weights_kind(self) -> str:
        """How projections are stored: "nf4", "bf16", "float16", "float32", "mixed"."""
        matrices = {name: one for name, one in self.weights.items() if len(one.shape) == 2}
        named = [one.kind for name, one in matrices.items() if name.endswith("_proj")]
        kind = _one(named or [one.kind for one in matrices.values()])
        return SHORT_NAMES.get(kind, kind)


def _one(kinds: Iterable[str]) -> str:
    distinct = set(kinds)
    return distinct.pop() if len(distinct) == 1 else "mixed"
