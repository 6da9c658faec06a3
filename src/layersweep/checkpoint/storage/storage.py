"""What a format of weights has to say. One file a format, and FORMATS lists them.

headers --Format.match--> Storage             which tensors, how many bytes; no torch
arena --Storage.packed--> Packed, views       --decode: plain torch, the oracle--> dense weight
                                              --launch: our CUDA kernel, equal bit for bit
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.settings import NO_SETTINGS, Settings
from layersweep.problems import DOWNLOAD_AGAIN, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kernels.kernels import Kernels
    from layersweep.kernels.weights import Alike

# Scales, those of scales, entries of their table and offsets are all far below this in a whole
# file, and no product of them overflows.
PLAUSIBLE = 1e18

ReadValues = Callable[[StoredTensor], bytes]
ReadTensor = Callable[[StoredTensor], "Tensor"]  # all its bytes, uint8


@dataclass(frozen=True)
class Headers:
    """What the headers of a checkpoint hold; formats fill `problems` and `notes`.

    `read` gives the bytes of a small tensor, or is None where only headers may be read.
    `settings`: what config.json says of the weights.
    """

    tensors: Mapping[str, StoredTensor]
    read: ReadValues | None
    problems: list[Problem]
    notes: dict[str, list[str]]
    settings: Settings = NO_SETTINGS

    def problem(self, tensor: StoredTensor, found: str, needed: str, hint: str = "") -> None:
        file = str(tensor.file)
        self.problems.append(Problem(file, tensor.name, found, needed, hint or DOWNLOAD_AGAIN))

    def expect(self, tensor: StoredTensor, dtype: str, count: int) -> bool:
        """Whether a tensor has so many elements of that dtype; if not, that is a problem."""
        fits = tensor.dtype == dtype and prod(tensor.shape) == count
        if not fits:
            self.problem(tensor, tensor.describe(), f"{dtype} [{count}]")
        return fits

    def note(self, text: str, tensor: StoredTensor) -> None:
        """An oddity that was read, told once for all tensors that have it."""
        self.notes.setdefault(text, []).append(tensor.name)


class Format(Protocol):
    """A format, which is a module. Which one a tensor belongs to is told by what is stored."""

    def base(self, tensor: StoredTensor) -> str | None:
        """The weight that this tensor shows to be of this format ("....weight"): its data, or a
        companion that no other format has. None for any other."""
        ...

    def companions(self, base: str) -> Iterable[str]:
        """Names of the tensors that may go with weight `base`."""
        ...

    def match(self, headers: Headers, base: str, shape: tuple[int, ...]) -> Storage | None:
        """How weight `base` of dense `shape` is stored; None where it has a problem."""
        ...


class Piece(NamedTuple):
    """Bytes that a weight takes of an arena: those of `source`, or made while reading."""

    source: StoredTensor | None
    nbytes: int


@dataclass(frozen=True)
class Look:
    """Numbers of a piece that a glance at a whole run judges: `count` of them, `step` bytes apart,
    from byte `first` on. None may be below `least`, NaN, or `below` and more, and halves ("2f2":
    two neighbours) must be finite; else `check` looks. "u1" and "u2" may be bits of floats.
    """

    piece: int
    dtype: Literal["f4", "i4", "u1", "u2", "f2", "2f2"]
    count: int
    first: int = 0
    step: int = 4
    least: float = 0.0
    below: float = PLAUSIBLE


class Packed(Protocol):
    """A weight as it lies in memory, on any device: views of its bytes."""

    def decode(self, out: Tensor) -> None:
        """Fill `out` (dense shape; float32, float16 or bfloat16) in plain torch, on any device:
        computed in float32, rounded once."""
        ...

    def launch(self, kernels: Kernels, out: Tensor) -> None:
        """The same by a CUDA kernel, bit for bit. `out` is of the kernels' dtype."""
        ...

    def launch_alike(self, kernels: Kernels, out: Tensor, alike: Alike) -> bool:
        """The same for several weights that lie alike, in one launch; False where that cannot be,
        and nothing is done."""
        ...


class Storage(ABC):
    """How one weight lies in its files. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """ "nf4", "q4_k", "bfloat16"."""

    @property
    @abstractmethod
    def stored(self) -> tuple[StoredTensor, ...]:
        """What is read whenever the weight is: its data, then its scales."""

    @abstractmethod
    def packed(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Packed:
        """The weight whose pieces arrived as `parts` (uint8)."""

    @abstractmethod
    def cut(self, start: int, count: int, shape: tuple[int, ...]) -> Storage:
        """Elements [start, start + count) of the weight taken flat, as one of `shape`. Both are
        multiples of `block`."""

    @property
    def plain(self) -> bool:
        """Whether the bytes are the values, so that a view of them is the weight."""
        return False

    @property
    def block(self) -> int:
        """Consecutive elements that share scales: weights are cut between them."""
        return 1

    @property
    def companions(self) -> int:
        """How many tensors go with the data, for people."""
        return len(self.stored) - 1

    @property
    def other_nbytes(self) -> int:
        """Of companions that are checked at opening and never read again."""
        return 0

    @property
    def words(self) -> str:
        """What `inspect` says of the scales: "nested, blocks of 64"."""
        return ""

    @property
    def layout(self) -> tuple[object, ...]:
        """Equal for weights of one shape that are decoded alike, but for `offset`."""
        return (self.kind,)

    @property
    def offset(self) -> float:
        """A number that weights of one launch may differ in; 0 where there is none."""
        return 0.0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What of it lies in an arena, in order."""
        return tuple([Piece(tensor, tensor.nbytes) for tensor in self.stored])

    @property
    def looks(self) -> tuple[Look, ...]:
        """The scales that are looked at once they are read."""
        return ()

    def check(self, parts: Sequence[Tensor]) -> None:
        """A closer look at them. Raises CheckpointError for NaN and infinity."""
        assert not self.looks, f"{self.kind}: no closer look"

    def make(self, read: ReadTensor, parts: Sequence[Tensor], shape: tuple[int, ...]) -> int:
        """Fill the pieces without a source; how many bytes were read for them."""
        raise AssertionError(f"{self.kind}: nothing is made while reading")


def cut_tensor(tensor: StoredTensor, start: int, count: int) -> StoredTensor:
    """Elements [start, start + count) of a tensor taken flat, as its name then says."""
    flat = tensor.reshaped((prod(tensor.shape),))
    return replace(flat.rows(start, count), name=f"{tensor.name}[{start}:{start + count}]")
