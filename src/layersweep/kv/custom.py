"""One's own codec: a class in a file, or one that an installed package offers.

    FILE.py:CLASS:K3V2      the class is called with (key_bits, value_bits)
    NAME:K3V2               an entry point NAME in the group layersweep.kv_codecs

The class needs `encode(x, stream, positions, mean=None)` and `decode(packed, positions)`; what
encode returns is its own affair. `stream.role` is key, value or, in models with MLA, latent. With
`nbytes(packed)` its bits are measured, without it the arm is simulated and its bits are unknown.
`append(packed, x, positions)` serves generation.
`layersweep codec check` tells whether it keeps the promises of `kv.codec.Codec`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersweep.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kv.codec import Codec
    from layersweep.kv.stream import Stream

ENTRY_POINTS = "layersweep.kv_codecs"
HINT = "see `layersweep codec check --help` and docs/codecs.md for an example of 30 lines"
# What code that is not ours may raise.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError)  # fmt: skip

Maker = Callable[[int, int], Any]


@dataclass(frozen=True)
class Held:
    """What somebody's encode returned, of whatever type, for every sequence of a batch."""

    sequences: tuple[Any, ...]
    tokens: int
    each: int  # numbers that one uncompressed sequence has

    @property
    def elements(self) -> int:
        return len(self.sequences) * self.each

    def slice_batch(self, start: int, stop: int) -> Held:
        return replace(self, sequences=self.sequences[start:stop])

    def moved(self, move: Callable[[Tensor], Tensor]) -> Held:
        """Where it is: nobody knows what it holds. Its input was a copy of its own."""
        return self


@dataclass(frozen=True)
class CustomCodec:
    """Somebody's codec behind the contract. `version` tells which code it was."""

    inner: Any
    method: str
    version: str
    key_bits: int
    value_bits: int

    @property
    def simulated(self) -> bool:
        return bool(getattr(self.inner, "simulated", not hasattr(self.inner, "nbytes")))

    @property
    def encoder(self) -> str:
        return str(getattr(self.inner, "encoder", "custom"))

    @property
    def wants_mean(self) -> bool:
        return bool(getattr(self.inner, "wants_mean", False))

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Any:
        """One sequence at a time, as a copy that the codec may keep or write into."""
        held = [
            self.inner.encode(
                x[i : i + 1].clone(), stream, positions[i : i + 1],
                None if mean is None else mean[i : i + 1],
            )
            for i in range(len(x))
        ]  # fmt: skip
        return Held(tuple(held), x.shape[2], x[:1].numel())

    def decode(self, packed: Any, positions: Tensor) -> Tensor:
        import torch

        parts = [
            self.inner.decode(one, positions[i : i + 1]) for i, one in enumerate(packed.sequences)
        ]
        return torch.cat(parts)

    def append(self, packed: Any, x: Tensor, positions: Tensor) -> Any:
        if not hasattr(self.inner, "append"):
            raise InputError(
                f"{self.method}: found no method `append`, needed one: a cache is to grow",
                hint=HINT,
            )
        held = [
            self.inner.append(one, x[i : i + 1].clone(), positions[i : i + 1])
            for i, one in enumerate(packed.sequences)
        ]
        return Held(tuple(held), packed.tokens + x.shape[2], packed.each + x[:1].numel())

    def nbytes(self, packed: Any) -> float:
        """NaN where the codec cannot say."""
        if not hasattr(self.inner, "nbytes"):
            return math.nan
        return math.fsum(self.inner.nbytes(one) for one in packed.sequences)

    def sharing_key(self, stream: Stream) -> Hashable:
        """Both numbers of bits: nobody knows whether its values depend on those of the keys."""
        return (self.method, self.version, self.key_bits, self.value_bits)

    def identity(self) -> Codec:
        """Unknown transforms have no noise floor of their own: that of a plain rotation."""
        from layersweep.kv.identity import Identity

        return Identity(of=self.method, randomized=True)


def build(method: str, key_bits: int, value_bits: int) -> CustomCodec:
    """`method`: "FILE.py:CLASS" or an entry point's name. Raises InputError, with the reason, for
    what cannot be loaded or lacks encode or decode."""
    maker, version = _from_file(method) if ".py:" in method else _from_entry_point(method)
    try:
        inner = maker(key_bits, value_bits)
    except TypeError as failure:
        raise InputError(
            f"KV codec '{method}': (key_bits, value_bits) cannot make one: {failure}",
            hint=HINT,
        ) from failure
    for name in ("encode", "decode"):
        if not callable(getattr(inner, name, None)):
            raise InputError(f"KV codec '{method}': found no method `{name}`, needed it", hint=HINT)
    return CustomCodec(inner, method.rpartition(":")[2].lower(), version, key_bits, value_bits)


def is_custom(method: str) -> bool:
    """Whether `method` names a file or an installed entry point."""
    return ".py:" in method or method in entry_point_names()


@cache
def entry_point_names() -> tuple[str, ...]:
    """Lower-case names that installed packages offer."""
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return tuple(sorted(point.name.lower() for point in found))


@cache
def _from_file(method: str) -> tuple[Maker, str]:
    """The class, and the first digits of the SHA-256 of its file."""
    path, _, name = method.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"KV codec '{method}': found no file {file}, needed one", hint=HINT)
    spec = importlib.util.spec_from_file_location(f"layersweep_codec_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    maker = getattr(module, name, None)
    if not callable(maker):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise InputError(
            f"KV codec '{method}': found no class {name} in {file}, needed it",
            hint=f"the file has {', '.join(classes) or 'no class'}",
        )
    return maker, hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _from_entry_point(method: str) -> tuple[Maker, str]:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name.lower() == method.lower():
            version = point.dist.version if point.dist is not None else "?"
            return point.load(), version
    raise InputError(f"KV codec '{method}': found no entry point of that name", hint=HINT)
