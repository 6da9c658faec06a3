"""The grammar of KV arms: "K3V2", "e8:K4V2@v=0.5@pb=2", "K2-4V2-4", "int4", "identity", "all".

    arm    := "exact" | "all" | "identity" [":" method option*] | fixed option*
            | [(method | own) ":"] "K" bits "V" bits option*
    own    := FILE ".py:" CLASS | the name of an entry point (kv.custom)
    option := "@" key "=" value

A fixed method has its bits in its name. Case does not matter, except in a file and its class.
@pb, @layers, @window and @sink say what stays exact. With @calibration=FILE (kv.calibration) the
bits are means over the layers, and may be fractions: K2.5V2.
A bare name is input only: K3V2 means the best method at those bits with what it needs on real
models, trellis:K3V2@fit=1@found=1, and where a cache grows with recent tokens in better shape, too
(kv.methods). Its options may say otherwise: K3V2@sink=0@found=0 is trellis:K3V2. What is spelled
out is taken as it stands. Tables and files print the resolved name: the method, then the options
in one order, codecs' defaults left out. Reading the grammar imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from layersweep.errors import InputError
from layersweep.kv import custom
from layersweep.kv.calibration import Calibration
from layersweep.kv.methods import (
    DEFAULT_METHOD,
    DEFAULTS,
    EXACT_BITS,
    FINE_BITS,
    FIRST_BLOCK,
    GROWING_DEFAULTS,
    METHODS,
)
from layersweep.kv.words import NAMES, Options, Words, bits_of, layers_of, options_of, written

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from layersweep.kv.codec import Codec, Packed
    from layersweep.kv.stream import Stream

_BITS = r"([0-9]+(?:\.[0-9]+)?)(?:-([0-9]+))?"
_PAIR = re.compile(f"k{_BITS}v{_BITS}", re.IGNORECASE)


@dataclass(frozen=True)
class Arm:
    """One way to keep keys and values. `name` is resolved, `requested` what the user wrote.

    The first and last `protect` layers, those that are not among `layers`, the first `sink` tokens
    of the text and the last `window` tokens stay exact. A stream with 16 bits is exact. With a
    `block`, tokens leave the window that many at a time. Of the newest `fine` tokens that are
    coded, what the codec left is coded, too. With a `calibration` the bits are means over the
    layers. `options` are the codec's own, defaults left out. `source` is where somebody's own codec
    comes from, as the user wrote it.
    """

    name: str
    requested: str
    method: str
    key_bits: float
    value_bits: float
    options: tuple[tuple[str, str], ...] = ()
    protect: int = 0
    layers: range | None = None
    window: int = 0
    block: int = 0
    fine: int = 0
    sink: int = 0
    source: str = ""
    calibration: Calibration | None = None

    @cached_property
    def codec(self) -> Codec | None:
        """None for the exact cache; at bits rounded up where layers have bits of their own
        (`in_layer`). Loads torch, or somebody's file: InputError if it cannot."""
        if self.method == "exact":
            return None
        key_bits, value_bits = math.ceil(self.key_bits), math.ceil(self.value_bits)
        if self.source:
            return custom.build(self.source, key_bits, value_bits)
        if self.method == "identity":
            of = self.name.split(":")[1].split("@")[0]
            return METHODS[of].identity(dict(self.options))
        return METHODS[self.method].build(key_bits, value_bits, dict(self.options))

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
        """Of the code, and of the file that bits come from."""
        if self.codec is None:
            return None
        own = self.calibration
        return self.codec.version + (f", calibration {own.sha256[:8]}" if own else "")

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
        left_out = self.layers is not None and layer not in self.layers
        return self.method == "exact" or protected or left_out

    def in_layer(self, layer: int, num_layers: int) -> Arm:
        """What a layer keeps: nothing coded, or the arm at the layer's own bits."""
        if self.is_exact_layer(layer, num_layers):
            return EXACT
        return self if self.layer_bits is None else self._at(*self.layer_bits[layer])

    @property
    def codecs(self) -> list[Codec]:
        """Those of all layers, each once."""
        pairs = dict.fromkeys(self.layer_bits) if self.layer_bits else None
        arms = [self] if pairs is None else [self._at(*pair) for pair in pairs]
        return [arm.codec for arm in arms if arm.codec is not None]

    @cached_property
    def layer_bits(self) -> list[tuple[int, int]] | None:
        """Bits of keys and values in each layer, by the calibration."""
        own = self.calibration
        return None if own is None else own.bits(self.key_bits, self.value_bits)

    def _at(self, key_bits: int, value_bits: int) -> Arm:
        """The same at these bits in every layer."""
        return replace(self, key_bits=key_bits, value_bits=value_bits, calibration=None)

    def check_model(self, num_layers: int, fingerprint: str | None = None) -> None:
        """Raise InputError for `@layers` beyond a model, or another model's calibration.
        `fingerprint`: of its checkpoint, if that is known."""
        if self.layers is not None and self.layers[-1] >= num_layers:
            raise InputError(
                f"KV arm '{self.requested}': found @layers={written(self.layers)}, needed layers "
                f"from 0 to {num_layers - 1}, which the model has",
                hint="layers are counted from 0",
            )
        if self.calibration is not None:
            self.calibration.check_model(num_layers, fingerprint)

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
    return parse(f"identity:{arm.method}{Options(dict(arm.options), {}).suffix}")


def parse(text: str, *, growing: bool = False) -> Arm:
    """The one arm that `text` describes. Raises InputError for anything else. `growing`: for a
    cache that every token reads as it grows, which decides what a bare name means."""
    arms = _expand(Words.of(text), growing)
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
        for arm in _expand(Words.of(item), growing):
            first = arms.setdefault(arm.name, arm)
            if (first.source, first.calibration) != (arm.source, arm.calibration):
                raise InputError(
                    f"KV arm '{arm.requested}': found '{first.requested}' with the same name "
                    f"{arm.name}, needed a name for each",
                    hint="give one of the classes or files another name",
                )
    return [arm for arm in arms.values() if arm.method != "exact"]


def _expand(words: Words, growing: bool) -> list[Arm]:
    method, last = words.method, words.last
    if not last:
        raise words.error("found an empty name, needed one")
    if words.source:
        if method in (*METHODS, *NAMES):
            raise words.error(f"found a class with the name of '{method}', needed another name")
    elif method == "identity" or (not method and last in NAMES):
        return _named(words, growing)
    elif method and method not in METHODS:
        words.refuse("method", method, METHODS)
    match = _PAIR.fullmatch(last)
    if not match:
        return [_fixed(words)]
    defaults = {} if method else _defaults(growing)
    method = method or DEFAULT_METHOD
    if method in METHODS and METHODS[method].fixed_bits:
        raise words.error(f"found bits after {method}, needed {method} alone: it has its own")
    options = options_of(words, method, defaults, calibrates=method == DEFAULT_METHOD)
    if options.calibration:
        if match[2] or match[4]:
            raise words.error("found a range of bits, needed one mean with @calibration")
        means = _number(match[1]), _number(match[3])
        options.calibration.bits(*means)  # refuses what cannot be
        return [_arm(words, method, *means, options)]
    keys, values = bits_of(words, match[1], match[2]), bits_of(words, match[3], match[4])
    return [_arm(words, method, k, v, options) for k in keys for v in values]


def _defaults(growing: bool) -> Mapping[str, str]:
    return GROWING_DEFAULTS if growing else DEFAULTS


def _number(text: str) -> float:
    """3 of "3", which prints without a point, and 2.5 of "2.5"."""
    return int(text) if text.isdigit() else float(text)


def _named(words: Words, growing: bool) -> list[Arm]:
    """exact, all, identity and identity:METHOD."""
    if words.method == "identity" or words.last == "identity":
        of = words.last if words.method else DEFAULT_METHOD
        if of not in METHODS:
            words.refuse("method", of, METHODS)
        options = options_of(words, of)
        if options.kept:
            raise words.error(f"'identity' takes no {', '.join(options.kept)}")
        name, bits = f"identity:{of}{options.suffix}", EXACT_BITS
        return [Arm(name, words.requested, "identity", bits, bits, tuple(options.own.items()))]
    if words.options:
        raise words.error(f"'{words.last}' takes no options")
    if words.last == "exact":
        return [replace(EXACT, requested=words.requested)]
    defaults = {DEFAULT_METHOD: _defaults(growing)}
    return [
        _arm(words, name, keys, values, options_of(words, name, defaults.get(name)))
        for name, method in METHODS.items()
        if method.installed
        for keys, values in method.pairs
    ]


def _fixed(words: Words) -> Arm:
    """What has no K..V..: a method whose name stands for its bits, or a mistake."""
    method, last = words.method, words.last
    bits = METHODS[last].fixed_bits if last in METHODS and not method else None
    if bits:
        return _arm(words, last, bits, bits, options_of(words, last))
    if not method and (last in METHODS or words.source):
        raise words.error(f"found a method without bits, needed {words.source}{last}:K3V2")
    if method:
        raise words.error(f"unknown name '{last}' after '{method}', needed for example K3V2")
    words.refuse("name", last, [*NAMES, *METHODS, "k3v2", "k4v2"])


def _arm(words: Words, method: str, keys: float, values: float, options: Options) -> Arm:
    if keys == values == EXACT_BITS:
        return replace(EXACT, requested=words.requested)
    fixed = method in METHODS and METHODS[method].fixed_bits
    kept = options.kept
    return Arm(
        name=method + ("" if fixed else f":K{keys}V{values}") + options.suffix,
        requested=words.requested,
        method=method,
        key_bits=keys,
        value_bits=values,
        options=tuple(options.own.items()),
        protect=int(kept.get("pb", 0)),
        layers=layers_of(words, kept["layers"]) if "layers" in kept else None,
        window=int(kept.get("window", 0)),
        block=int(kept.get("block", 0)),
        fine=int(kept.get("fine", 0)),
        sink=int(kept.get("sink", 0)),
        source=words.source,
        calibration=options.calibration,
    )
