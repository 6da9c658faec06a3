"""KV arms and codecs. The grammar needs no torch; codecs and caches load it when they are used."""

from __future__ import annotations

from layersweep.kv.arms import Arm, parse, parse_arms
from layersweep.kv.stream import Stream

__all__ = ["Arm", "Stream", "parse", "parse_arms"]
