"""The methods that an arm may name: where their codecs live, their options, what they need."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layersweep.kv.codec import Codec

BITS = (1, 2, 3, 4, 5, 6, 8, 16)
EXACT_BITS = 16
# A bare K3V2 is DEFAULT_METHOD with DEFAULTS, trellis:K3V2@fit=1@found=1; where a cache
# grows, with GROWING_DEFAULTS. Why, by how much: docs/codecs.md, "Attention sinks", "Growing
# caches", "Coordinates from a text".
DEFAULT_METHOD = "trellis"
DEFAULTS: Mapping[str, str] = MappingProxyType({"fit": "1", "found": "1"})
GROWING_DEFAULTS: Mapping[str, str] = MappingProxyType(
    {**DEFAULTS, "window": "8", "block": "16", "fine": "96"}
)
FIRST_BLOCK = 128  # tokens that a channel mean comes from where later ones are not known yet
FINE_BITS = 2  # of what a codec has left of recent tokens
REFERENCE_BITS = ((3, 2), (4, 2))


@dataclass(frozen=True)
class Method:
    """Where a method's dataclass lives, and the values of each option, the default one first.

    `fixed_bits`: of a method that is an arm by its name alone. `package`: what must be installed
    for it, as (module, name to install). `refines`: what it leaves of a vector can be coded again.
    `published`: the bits of keys and values that `all` takes of a method with other bits than most.
    """

    module: str
    dataclass: str
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fixed_bits: int | None = None
    package: tuple[str, str] | None = None
    refines: bool = False
    published: tuple[tuple[int, int], ...] = REFERENCE_BITS

    def build(self, key_bits: int, value_bits: int, options: dict[str, str]) -> Codec:
        kind = getattr(importlib.import_module(self.module), self.dataclass)
        codec: Codec = kind(key_bits, value_bits, **options)
        return codec

    def identity(self, options: dict[str, str]) -> Codec:
        bits = self.fixed_bits or EXACT_BITS
        return self.build(bits, bits, options).identity()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The bits of keys and values that `all` takes."""
        return ((self.fixed_bits, self.fixed_bits),) if self.fixed_bits else self.published

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package[0]) is not None


_GROUPS = (("group", ("64", "32", "128")),)
_ROTATE = (("rotate", ("0", "1")),)
_RESIDUAL = (("residual", ("0", "32", "64", "128")),)
METHODS = MappingProxyType(
    {
        "trellis": Method(
            "layersweep.kv.trellis",
            "Trellis",
            options=(("states", ("256", "1024")), ("fit", ("0", "1")), ("found", ("0", "1"))),
            refines=True,
        ),
        "e8": Method("layersweep.kv.e8", "E8", options=(("v", ("0.6", "0.5")),), refines=True),
        "lloyd": Method("layersweep.kv.lloyd", "Lloyd", refines=True),
        "turbo": Method("layersweep.kv.turbo", "Turbo", refines=True),
        "turboquant": Method(
            "layersweep.kv.turboquant", "TurboQuant", published=((3, 4), (4, 4), (8, 4), (3, 3))
        ),
        "voronoi": Method("layersweep.kv.voronoi", "Voronoi", refines=True),
        "kivi": Method("layersweep.kv.kivi", "Kivi", _RESIDUAL),
        "kvarn": Method("layersweep.kv.kvarn", "KVarN", (("group", ("128", "64")),)),
        "oscar": Method("layersweep.kv.oscar", "Oscar", published=((2, 2),)),
        "nexusquant": Method(
            "layersweep.kv.nexusquant", "NexusQuant", package=("nexusquant", "nexusquant-kv")
        ),
        "int4": Method("layersweep.kv.uniform", "Uniform", _GROUPS, fixed_bits=4),
        "int2": Method("layersweep.kv.uniform", "Uniform", _GROUPS, fixed_bits=2),
        "q8_0": Method("layersweep.kv.ggml", "Ggml", _ROTATE, fixed_bits=8),
        "q5_0": Method("layersweep.kv.ggml", "Ggml", _ROTATE, fixed_bits=5),
        "q4_0": Method("layersweep.kv.ggml", "Ggml", _ROTATE, fixed_bits=4),
        "fp8": Method("layersweep.kv.fp8", "Fp8", fixed_bits=8),
    }
)
