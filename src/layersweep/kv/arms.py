"""The grammar of KV arms: "K3V2", "e8:K4V2@v=0.5@pb=2", "K2-4V2-4", "identity", "all".

    arm    := "exact" | "identity" [":" method] | [method ":"] "K" bits "V" bits option*
    option := "@" key "=" value

Case does not matter. A name is resolved to what tables and files print: the method is spelled
out, options are in one order, defaults are left out. Reading the grammar imports no torch.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from layersweep.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from layersweep.kv.codec import Codec, Packed
    from layersweep.kv.stream import Stream

BITS = (1, 2, 3, 4, 5, 6, 8, 16)
EXACT_BITS = 16
DEFAULT_METHOD = "lloyd"
REFERENCE_BITS = ((3, 2), (4, 2))


@dataclass(frozen=True)
class Method:
    """Where a method's dataclass lives, and the values of each option, the default one first."""

    module: str
    dataclass: str
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def build(self, key_bits: int, value_bits: int, options: dict[str, str]) -> Codec:
        kind = getattr(importlib.import_module(self.module), self.dataclass)
        codec: Codec = kind(key_bits, value_bits, **options)
        return codec


METHODS = MappingProxyType(
    {
        "e8": Method("layersweep.kv.e8", "E8", options=(("v", ("0.6", "0.5")),)),
        "lloyd": Method("layersweep.kv.lloyd", "Lloyd"),
    }
)
_NAMES = ("exact", "identity", "all")
_COUNTS = ("pb", "window", "sink")
_PAIR = re.compile(r"k([0-9]+)(?:-([0-9]+))?v([0-9]+)(?:-([0-9]+))?")


@dataclass(frozen=True)
class Arm:
    """One way to keep keys and values. `name` is resolved, `requested` what the user wrote.

    The first and last `protect` layers, the first `sink` and the last `window` tokens stay exact.
    A stream with 16 bits is exact. `options` are the codec's own, defaults left out.
    """

    name: str
    requested: str
    method: str
    key_bits: int
    value_bits: int
    options: tuple[tuple[str, str], ...] = ()
    protect: int = 0
    window: int = 0
    sink: int = 0

    @cached_property
    def codec(self) -> Codec | None:
        """None for the exact cache. Loads torch."""
        if self.method == "exact":
            return None
        if self.method == "identity":
            return METHODS[self.name.split(":")[1]].build(EXACT_BITS, EXACT_BITS, {}).identity()
        return METHODS[self.method].build(self.key_bits, self.value_bits, dict(self.options))

    @property
    def simulated(self) -> bool:
        """The codec does not store the bits that are counted for it."""
        return self.codec is not None and self.codec.simulated

    @property
    def codec_version(self) -> str | None:
        return None if self.codec is None else self.codec.version

    @property
    def encoder(self) -> str | None:
        return None if self.codec is None else self.codec.encoder

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        """`codec.encode`: an arm is used like its codec. InputError for the exact cache."""
        return self._need_codec().encode(x, stream, positions, mean)

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        return self._need_codec().decode(packed, positions)

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return self._need_codec().append(packed, x, positions)

    def nbytes(self, packed: Packed) -> int:
        return self._need_codec().nbytes(packed)

    def _need_codec(self) -> Codec:
        if self.codec is None:
            raise InputError(
                f"KV arm '{self.name}': found the exact cache, needed an arm with a codec",
                hint="the exact cache stores tensors as they are: there is nothing to encode",
            )
        return self.codec

    def is_exact_layer(self, layer: int, num_layers: int) -> bool:
        """Whether layer 0 <= `layer` < `num_layers` keeps its keys and values as they are."""
        protected = layer < self.protect or layer >= num_layers - self.protect
        return self.method == "exact" or protected


EXACT = Arm("exact", "exact", "exact", EXACT_BITS, EXACT_BITS)


def identity_arm(method: str) -> Arm:
    """The transforms of `method` without its quantization."""
    return parse(f"identity:{method}")


def parse(text: str) -> Arm:
    """The one arm that `text` describes. Raises InputError for anything else."""
    arms = _expand(text)
    if len(arms) != 1:
        raise InputError(
            f"KV arm '{text}': found {len(arms)} arms, needed one",
            hint=f"write one of them, for example {arms[0].name}",
        )
    return arms[0]


def parse_arms(text: str) -> list[Arm]:
    """The arms of a comma-separated list, grids expanded, each resolved name once.

    `exact` is left out: it is the baseline of every evaluation. Raises InputError.
    """
    arms: dict[str, Arm] = {}
    for item in text.split(","):
        for arm in _expand(item):
            arms.setdefault(arm.name, arm)
    return [arm for arm in arms.values() if arm.method != "exact"]


def _expand(text: str) -> list[Arm]:
    requested = text.strip()
    core, *options = requested.lower().split("@")
    if not core:
        raise InputError(f"KV arm '{requested}': found an empty name, needed one", hint=_existing())
    method, colon, pair = core.rpartition(":")
    if core in _NAMES or method == "identity":
        if options:
            raise InputError(f"KV arm '{requested}': '{core}' takes no options")
        return _named(core, pair, requested)
    if colon and method not in METHODS:
        _refuse(requested, "method", method, METHODS)
    match = _PAIR.fullmatch(pair)
    if not match:
        if pair in METHODS:
            raise InputError(
                f"KV arm '{requested}': found a method without bits, needed {pair}:K3V2",
                hint=_existing(),
            )
        _refuse(requested, "name", pair, [*_NAMES, "k3v2", "k4v2"])
    method = method or DEFAULT_METHOD
    own, counts = _options(requested, method, options)
    keys, values = _bits(requested, match[1], match[2]), _bits(requested, match[3], match[4])
    return [_arm(requested, method, k, v, own, counts) for k in keys for v in values]


def _named(core: str, last: str, requested: str) -> list[Arm]:
    if core == "all":
        return [_arm(requested, m, k, v, {}, {}) for m in METHODS for k, v in REFERENCE_BITS]
    if core == "exact":
        return [Arm("exact", requested, "exact", EXACT_BITS, EXACT_BITS)]
    of = DEFAULT_METHOD if core == "identity" else last
    if of not in METHODS:
        _refuse(requested, "method", of, METHODS)
    return [Arm(f"identity:{of}", requested, "identity", EXACT_BITS, EXACT_BITS)]


def _arm(
    requested: str, method: str, keys: int, values: int, own: dict[str, str], counts: dict[str, int]
) -> Arm:
    if keys == values == EXACT_BITS:
        return Arm("exact", requested, "exact", keys, values)
    suffix = "".join(f"@{key}={value}" for key, value in (own | counts).items())
    return Arm(
        name=f"{method}:K{keys}V{values}{suffix}",
        requested=requested,
        method=method,
        key_bits=keys,
        value_bits=values,
        options=tuple(own.items()),
        protect=counts.get("pb", 0),
        window=counts.get("window", 0),
        sink=counts.get("sink", 0),
    )


def _options(
    requested: str, method: str, options: list[str]
) -> tuple[dict[str, str], dict[str, int]]:
    """The codec's own options and the counts, each in their one order, defaults left out."""
    own_values = dict(METHODS[method].options)
    given: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in own_values and key not in _COUNTS:
            _refuse(requested, f"option of '{method}'", key, [*own_values, *_COUNTS])
        if not equals or key in given:
            found = "no value" if not equals else "it twice"
            raise InputError(f"KV arm '{requested}': option '{key}' has {found}, needed @{key}=N")
        given[key] = value
    for key, allowed in own_values.items():
        if given.get(key, allowed[0]) not in allowed:
            needed = " or ".join(allowed)
            raise InputError(f"KV arm '{requested}': found {key}={given[key]}, needed {needed}")
    for key in _COUNTS:
        if not re.fullmatch(r"[0-9]{1,9}", given.get(key, "0")):
            raise InputError(
                f"KV arm '{requested}': found {key}={given[key]}, needed a whole number from 0",
                hint=f"for example @{key}=2",
            )
    own = {key: given[key] for key, (default, *_) in own_values.items() if key in given}
    own = {key: value for key, value in own.items() if value != own_values[key][0]}
    return own, {key: int(given[key]) for key in _COUNTS if int(given.get(key, "0"))}


def _bits(requested: str, first: str, last: str | None) -> list[int]:
    """The allowed numbers of bits from `first` to `last`, both of which must be allowed."""
    low, high = int(first), int(last or first)
    for found in (low, high):
        if found not in BITS:
            raise InputError(
                f"KV arm '{requested}': found {found} bits, needed one of "
                + ", ".join(map(str, BITS)),
                hint="16 keeps that stream exact",
            )
    if low > high:
        raise InputError(
            f"KV arm '{requested}': found the range {low}-{high}, needed the smaller number first"
        )
    return [bits for bits in BITS if low <= bits <= high]


def _refuse(requested: str, what: str, found: str, existing: Iterable[str]) -> NoReturn:
    names = list(existing)
    close = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    guess = f"did you mean '{close[0]}'? " if close else ""
    listed = ", ".join(names)
    raise InputError(
        f"KV arm '{requested}': unknown {what} '{found}', needed one of {listed}",
        hint=guess + _existing(),
    )


def _existing() -> str:
    return (
        f"arms are exact, identity, all, or METHOD:K3V2 with METHOD one of {', '.join(METHODS)}; "
        f"options @pb=N @window=N @sink=N"
    )
