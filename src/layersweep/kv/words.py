"""What a user wrote for an arm, cut into words, and what its options and bits may be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from layersweep.errors import InputError
from layersweep.kv import custom
from layersweep.kv.calibration import Calibration, read_calibration
from layersweep.kv.methods import BITS, METHODS

NAMES = ("exact", "identity", "all")
# Options of every method: what stays exact, and what recent tokens get.
_KEPT = ("pb", "layers", "window", "block", "fine", "sink")
_LAYERS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class Words:
    """What the user wrote, cut: "e8", "k3v2", ("pb=2",) of "e8:K3V2@pb=2"."""

    requested: str
    method: str
    last: str
    options: tuple[str, ...]
    source: str

    @classmethod
    def of(cls, text: str) -> Words:
        requested = text.strip()
        path, in_file, rest = requested.rpartition(".py:")
        core, *options = rest.split("@")
        head, _, last = core.rpartition(":")
        lower, given = head.lower(), tuple(map(_spelled, options))
        if in_file:
            source = path + in_file + head
        else:  # without a method or with one of ours, no entry points need to be read
            known = not head or lower in (*METHODS, *NAMES)
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


@dataclass(frozen=True)
class Options:
    """A codec's own options and what an arm keeps exact, each in their one order and one spelling,
    defaults left out; and where the bits of its layers come from."""

    own: Mapping[str, str]
    kept: Mapping[str, str]
    calibration: Calibration | None = None

    @property
    def suffix(self) -> str:
        """As names have it: a calibration by its file's name alone, and no `sink` that goes without
        saying."""
        named = {"calibration": self.calibration.name} if self.calibration else {}
        every, meant = {**self.own, **named, **self.kept}, _sink_of(self.own)
        if self.kept.get("sink", "0") == meant:
            every.pop("sink", None)
        else:
            every.setdefault("sink", "0")
        return "".join(f"@{key}={value}" for key, value in every.items())


def options_of(
    words: Words,
    method: str,
    defaults: Mapping[str, str] | None = None,
    *,
    calibrates: bool = False,
) -> Options:
    """`defaults`: what is not given. `calibrates`: @calibration may be among them.

    Whoever gets here is about to use the method: what it needs must be installed.
    """
    kind = METHODS.get(method)
    if kind and kind.package and not kind.installed:
        raise words.error(
            f"found no package {kind.package[1]}, needed it for {method}",
            hint=f"pip install {kind.package[1]}",
        )
    own_values = dict(kind.options) if kind else {}
    known = [*own_values, *_KEPT, *(["calibration"] if calibrates else [])]
    given = {**(defaults or {}), **_given(words, method, known)}
    given.setdefault("sink", _sink_of(given))
    for key, allowed in own_values.items():
        if given.get(key, allowed[0]) not in allowed:
            raise words.error(f"found {key}={given[key]}, needed {' or '.join(allowed)}")
    own = {key: given[key] for key in own_values if key in given}
    own = {key: value for key, value in own.items() if value != own_values[key][0]}
    kept = {key: _plain(words, key, given[key]) for key in _KEPT if key in given}
    kept = {key: value for key, value in kept.items() if key == "layers" or value != "0"}
    if "fine" in kept and not (kind and kind.refines):
        refining = ", ".join(name for name, one in METHODS.items() if one.refines)
        raise words.error(f"found fine={kept['fine']}, needed one of {refining} for it")
    if "calibration" not in given:
        return Options(own, kept)
    if {"pb", "layers"} & kept.keys():
        raise words.error(
            "found @calibration with @pb or @layers, needed one of them",
            "a calibration gives bits to all layers",
        )
    return Options(own, kept, read_calibration(Path(given["calibration"])))


def _sink_of(options: Mapping[str, str]) -> str:
    """First tokens that stay exact where nobody says so: sinks are found by the first of all."""
    return "1" if options.get("found") == "1" else "0"


def _given(words: Words, method: str, known: Sequence[str]) -> dict[str, str]:
    """Options and their values, each once."""
    given: dict[str, str] = {}
    for option in words.options:
        key, equals, value = option.partition("=")
        if key not in known:
            words.refuse(f"option of '{method}'", key, known)
        if not equals or key in given:
            found = "no value" if not equals else "it twice"
            raise words.error(f"option '{key}' has {found}, needed @{key}=N")
        given[key] = value
    return given


def _spelled(option: str) -> str:
    """In small letters, but for a file."""
    key, equals, value = option.partition("=")
    return key.lower() + equals + (value if key.lower() == "calibration" else value.lower())


def _plain(words: Words, key: str, value: str) -> str:
    """The one spelling of a value of _KEPT."""
    if key == "layers":
        return written(layers_of(words, value))
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise words.error(
            f"found {key}={value}, needed a whole number from 0", f"for example @{key}=2"
        )
    return str(int(value))


def layers_of(words: Words, value: str) -> range:
    """ "3" or "0-7", the last one included."""
    match, hint = _LAYERS.fullmatch(value), "for example @layers=0-7, counted from 0"
    if not match:
        needed = "a layer or the first and the last one"
        raise words.error(f"found layers={value}, needed {needed}", hint)
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise words.error(f"found layers={value}, needed the smaller number first", hint)
    return range(first, last + 1)


def written(layers: range) -> str:
    """As @layers has it."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def bits_of(words: Words, first: str, last: str | None) -> list[int]:
    """The allowed numbers of bits from `first` to `last`, both of which must be allowed."""
    if "." in first:
        raise words.error(
            f"found {first} bits, needed a whole number without @calibration=FILE",
            "`layersweep calibrate` writes the file",
        )
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
        "@pb=N @layers=N-N @window=N @block=N @fine=N @sink=N"
    )
