"""The grammar of KV arms: "K3V2", "e8:K4V2@v=0.5@pb=2", "K2-4V2-4", "int4", "identity", "all".

    arm    := "exact" | "all" | "identity" [":" method option*] | fixed option*
            | [(method | own) ":"] "K" bits "V" bits option*
    own    := FILE ".py:" CLASS | the name of an entry point (kv.custom)
    option := "@" key "=" value

A fixed method has its bits in its name. Case does not matter, except in a file and its class.
A bare name is input only: K3V2 means the best method at those bits with what it needs on real
models, trellis:K3V2@found=1@sink=1, and where a cache grows with recent tokens in better shape, too
(kv.methods). Its options may say otherwise: K3V2@sink=0@found=0 is trellis:K3V2. What is spelled
out is taken as it stands. Tables and files print the resolved name: the method, then the options
in one order, codecs' defaults left out. Reading the grammar imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from layersweep.errors import InputError
from layersweep.kv import custom
from layersweep.kv.methods import (
    BITS,
    DEFAULT_METHOD,
    DEFAULTS,
    EXACT_BITS,
    FINE_BITS,
    FIRST_BLOCK,
    GROWING_DEFAULTS,
    METHODS,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from layersweep.kv.codec import Codec, Packed
    from layersweep.kv.stream import Stream

_NAMES = ("exact", "identity", "all")
_COUNTS = ("pb", "window", "block", "fine", "sink")
_NONE: Mapping[str, str] = MappingProxyType({})
_PAIR = re.compile(r"k([0-9]+)(?:-([0-9]+))?v([0-9]+)(?:-([0-9]+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Arm:
    """One way to keep keys and values. `name` is resolved, `requested` what the user wrote.

    The first and last `protect` layers, the first `sink` tokens of the text and the last `window`
    tokens stay exact. A stream with 16 bits is exact. With a `block`, tokens leave the window that
    many at a time. Of the newest `fine` tokens that are coded, what the codec left is coded, too.
    `options` are the codec's own, defaults left out. `source` is where somebody's own codec comes
    from, as the user wrote it.
    """

    name: str
    requested: str
    method: str
    key_bits: int
    value_bits: int
    options: tuple[tuple[str, str], ...] = ()
    protect: int = 0
    window: int = 0
    block: int = 0
    fine: int = 0
    sink: int = 0
    source: str = ""

    @cached_property
    def codec(self) -> Codec | None:
        """None for the exact cache. Loads torch, or somebody's file: InputError if it cannot."""
        if self.method == "exact":
            return None
        if self.source:
            return custom.build(self.source, self.key_bits, self.value_bits)
        if self.method == "identity":
            of = self.name.split(":")[1].split("@")[0]
            return METHODS[of].identity(dict(self.options))
        return METHODS[self.method].build(self.key_bits, self.value_bits, dict(self.options))

    @cached_property
    def fine_codec(self) -> Codec | None:
        """Of what the codec leaves of recent tokens."""
        if not self.fine:
            return None
        return METHODS[self.method].build(FINE_BITS, FINE_BITS, dict(self.options))

    @property
    def simulated(self) -> bool:
        """The codec does not store the bits that are counted for it."""
        return self.codec is not None and self.codec.simulated

    @property
    def fits(self) -> bool:
        """It takes coordinates from the reference text, where that rides (sweep/reference.py)."""
        return ("fit", "1") in self.options

    @property
    def codec_version(self) -> str | None:
        return None if self.codec is None else self.codec.version

    def encoder_on(self, device: torch.device) -> str | None:
        """What encodes on a device, for example "torch"; None for the exact cache."""
        if self.codec is None:
            return None
        on_device = getattr(self.codec, "encoder_on", None)
        return on_device(device) if on_device else self.codec.encoder

    def encode(
        self, x: Tensor, stream: Stream, positions: Tensor, mean: Tensor | None = None
    ) -> Packed:
        """`codec.encode`: an arm is used like its codec. InputError for the exact cache."""
        return self._need_codec().encode(x, stream, positions, mean)

    def decode(self, packed: Packed, positions: Tensor) -> Tensor:
        return self._need_codec().decode(packed, positions)

    def append(self, packed: Packed, x: Tensor, positions: Tensor) -> Packed:
        return self._need_codec().append(packed, x, positions)

    def nbytes(self, packed: Packed) -> float:
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

    def coded_until(self, tokens: int) -> int:
        """Position up to which the codec has the tokens after the sink when `tokens` are there. It
        depends on nothing else, so that a cache does not show in which pieces it has grown."""
        left = tokens - self.window - self.sink
        if self.block:
            left = left // self.block * self.block if left >= FIRST_BLOCK else 0
        return min(self.sink, tokens) + max(left, 0)

    def keeps_window(self, window: int | None) -> bool:
        """Whether a layer that looks at its last `window` tokens keeps them exact: they are gone
        before the first block is full."""
        return (
            window is not None
            and self.block > 0
            and window <= self.sink + self.window + self.block + FIRST_BLOCK
        )


EXACT = Arm("exact", "exact", "exact", EXACT_BITS, EXACT_BITS)


def identity_arm(arm: Arm) -> Arm:
    """The transforms of `arm` without its quantization, in every layer and token."""
    return parse(f"identity:{arm.method}{_suffix(dict(arm.options))}")


def parse(text: str, *, growing: bool = False) -> Arm:
    """The one arm that `text` describes. Raises InputError for anything else. `growing`: for a
    cache that every token reads as it grows, which decides what a bare name means."""
    arms = _expand(_Words.of(text), growing)
    if len(arms) != 1:
        raise InputError(
            f"KV arm '{text}': found {len(arms)} arms, needed one",
            hint=f"write one of them, for example {arms[0].name}",
        )
    return arms[0]


def parse_arms(text: str, *, growing: bool = False) -> list[Arm]:
    """The arms of a comma-separated list, grids expanded, each resolved name once; see parse.

    `exact` is left out: it is the baseline of every evaluation. Raises InputError.
    """
    arms: dict[str, Arm] = {}
    for item in text.split(","):
        for arm in _expand(_Words.of(item), growing):
            first = arms.setdefault(arm.name, arm)
            if first.source != arm.source:
                raise InputError(
                    f"KV arm '{arm.requested}': found '{first.requested}' with the same name "
                    f"{arm.name}, needed a name for each",
                    hint="give one of the classes another name",
                )
    return [arm for arm in arms.values() if arm.method != "exact"]


@dataclass(frozen=True)
class _Words:
    """What the user wrote, cut: "e8", "k3v2", ("pb=2",) of "e8:K3V2@pb=2"."""

    requested: str
    method: str
    last: str
    options: tuple[str, ...]
    source: str

    @classmethod
    def of(cls, text: str) -> _Words:
        requested = text.strip()
        path, in_file, rest = requested.rpartition(".py:")
        core, *options = rest.split("@")
        head, _, last = core.rpartition(":")
        lower, given = head.lower(), tuple(option.lower() for option in options)
        if in_file:
            source = path + in_file + head
        else:  # without a method or with one of ours, no entry points need to be read
            known = not head or lower in (*METHODS, *_NAMES)
            source = "" if known or not custom.is_custom(lower) else lower
        return cls(requested, lower, last if in_file else last.lower(), given, source)

    def refuse(self, what: str, found: str, existing: Iterable[str]) -> NoReturn:
        names = list(existing)
        close = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
        guess = f"did you mean '{close[0]}'? " if close else ""
        listed = ", ".join(names)
        raise self.error(
            f"unknown {what} '{found}', needed one of {listed}", hint=guess + _existing()
        )

    def error(self, message: str, hint: str = "") -> InputError:
        return InputError(f"KV arm '{self.requested}': {message}", hint=hint or _existing())


def _expand(words: _Words, growing: bool) -> list[Arm]:
    method, last = words.method, words.last
    if not last:
        raise words.error("found an empty name, needed one")
    if words.source:
        if method in (*METHODS, *_NAMES):
            raise words.error(f"found a class with the name of '{method}', needed another name")
    elif method == "identity" or (not method and last in _NAMES):
        return _named(words, growing)
    elif method and method not in METHODS:
        words.refuse("method", method, METHODS)
    match = _PAIR.fullmatch(last)
    if not match:
        return [_fixed(words)]
    defaults = _NONE if method else _defaults(growing)
    method = method or DEFAULT_METHOD
    if method in METHODS and METHODS[method].fixed_bits:
        raise words.error(f"found bits after {method}, needed {method} alone: it has its own")
    own, counts = _options(words, method, defaults)
    keys, values = _bits(words, match[1], match[2]), _bits(words, match[3], match[4])
    return [_arm(words, method, k, v, own, counts) for k in keys for v in values]


def _defaults(growing: bool) -> Mapping[str, str]:
    return GROWING_DEFAULTS if growing else DEFAULTS


def _named(words: _Words, growing: bool) -> list[Arm]:
    """exact, all, identity and identity:METHOD."""
    if words.method == "identity" or words.last == "identity":
        of = words.last if words.method else DEFAULT_METHOD
        if of not in METHODS:
            words.refuse("method", of, METHODS)
        own, counts = _options(words, of)
        if counts:
            raise words.error(f"'identity' takes no {', '.join(counts)}")
        name = f"identity:{of}{_suffix(own)}"
        bits = EXACT_BITS
        return [Arm(name, words.requested, "identity", bits, bits, tuple(own.items()))]
    if words.options:
        raise words.error(f"'{words.last}' takes no options")
    if words.last == "exact":
        return [replace(EXACT, requested=words.requested)]
    defaults = {DEFAULT_METHOD: _defaults(growing)}
    return [
        _arm(words, name, keys, values, *_options(words, name, defaults.get(name, _NONE)))
        for name, method in METHODS.items()
        if method.installed
        for keys, values in method.pairs
    ]


def _fixed(words: _Words) -> Arm:
    """What has no K..V..: a method whose name stands for its bits, or a mistake."""
    method, last = words.method, words.last
    bits = METHODS[last].fixed_bits if last in METHODS and not method else None
    if bits:
        return _arm(words, last, bits, bits, *_options(words, last))
    if not method and (last in METHODS or words.source):
        raise words.error(f"found a method without bits, needed {words.source}{last}:K3V2")
    if method:
        raise words.error(f"unknown name '{last}' after '{method}', needed for example K3V2")
    words.refuse("name", last, [*_NAMES, *METHODS, "k3v2", "k4v2"])


def _arm(
    words: _Words, method: str, keys: int, values: int,
    own: Mapping[str, str], counts: Mapping[str, int],
) -> Arm:  # fmt: skip
    if keys == values == EXACT_BITS:
        return replace(EXACT, requested=words.requested)
    fixed = method in METHODS and METHODS[method].fixed_bits
    return Arm(
        name=method + ("" if fixed else f":K{keys}V{values}") + _suffix({**own, **counts}),
        requested=words.requested,
        method=method,
        key_bits=keys,
        value_bits=values,
        options=tuple(own.items()),
        protect=counts.get("pb", 0),
        window=counts.get("window", 0),
        block=counts.get("block", 0),
        fine=counts.get("fine", 0),
        sink=counts.get("sink", 0),
        source=words.source,
    )


def _suffix(options: Mapping[str, object]) -> str:
    return "".join(f"@{key}={value}" for key, value in options.items())


def _options(
    words: _Words, method: str, defaults: Mapping[str, str] = _NONE
) -> tuple[dict[str, str], dict[str, int]]:
    """The codec's own options and the counts, each in their one order, the codec's defaults left
    out. `defaults`: what is not given.

    Whoever gets here is about to use the method: what it needs must be installed.
    """
    kind = METHODS.get(method)
    if kind and kind.package and not kind.installed:
        raise words.error(
            f"found no package {kind.package[1]}, needed it for {method}",
            hint=f"pip install {kind.package[1]}",
        )
    own_values = dict(kind.options) if kind else {}
    given: dict[str, str] = {}
    for option in words.options:
        key, equals, value = option.partition("=")
        if key not in own_values and key not in _COUNTS:
            words.refuse(f"option of '{method}'", key, [*own_values, *_COUNTS])
        if not equals or key in given:
            found = "no value" if not equals else "it twice"
            raise words.error(f"option '{key}' has {found}, needed @{key}=N")
        given[key] = value
    given = {**defaults, **given}
    for key, allowed in own_values.items():
        if given.get(key, allowed[0]) not in allowed:
            raise words.error(f"found {key}={given[key]}, needed {' or '.join(allowed)}")
    for key in _COUNTS:
        if not re.fullmatch(r"[0-9]{1,9}", given.get(key, "0")):
            raise words.error(
                f"found {key}={given[key]}, needed a whole number from 0", f"for example @{key}=2"
            )
    if int(given.get("fine", 0)) and not (kind and kind.refines):
        refining = ", ".join(name for name, one in METHODS.items() if one.refines)
        raise words.error(f"found fine={given['fine']}, needed one of {refining} for it")
    own = {key: given[key] for key, (default, *_) in own_values.items() if key in given}
    own = {key: value for key, value in own.items() if value != own_values[key][0]}
    counts = {key: int(given.get(key, 0)) for key in _COUNTS}
    return own, {key: count for key, count in counts.items() if count}


def _bits(words: _Words, first: str, last: str | None) -> list[int]:
    """The allowed numbers of bits from `first` to `last`, both of which must be allowed."""
    low, high = int(first), int(last or first)
    for found in (low, high):
        if found not in BITS:
            listed = ", ".join(map(str, BITS))
            raise words.error(f"found {found} bits, needed one of {listed}", "16 keeps it exact")
    if low > high:
        raise words.error(f"found the range {low}-{high}, needed the smaller number first")
    return [bits for bits in BITS if low <= bits <= high]


def _existing() -> str:
    paired = [name for name, method in METHODS.items() if not method.fixed_bits]
    fixed = [name for name, method in METHODS.items() if method.fixed_bits]
    return (
        f"arms are exact, identity, all, {', '.join(fixed)}, or METHOD:K3V2 with METHOD one of "
        f"{', '.join(paired)} or FILE.py:CLASS; options "
        "@pb=N @window=N @block=N @fine=N @sink=N"
    )
