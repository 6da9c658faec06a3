"""Reads fields of config.json one by one, and keeps everything that is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layersweep.families.spec import Activation, Rope, RopeKind
from layersweep.problems import Problem, show

LARGEST_COUNT = 1 << 31
# More than that is no model, and would be looked for one by one; experts of all layers together.
MOST_LAYERS, MOST_EXPERTS = 4096, 65_536
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 1.2e-38, 3.4e38  # what is computed with, without denormals
HINT = "config.json must describe the tensors beside it; download both again"
ROPE_HINT = "this RoPE cannot be computed so far"
ROPE_NUMBERS: Mapping[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
    "proportional": (),
}
ROPE_OPTIONS: Mapping[RopeKind, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
    "proportional": ("factor",),
}
LONG_FACTORS = ("short_factor", "long_factor")
ROPE_ALIASES = {"su": "longrope"}
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}


class Fields:
    """`defaults`: of the family, for fields that the file leaves out; `aliases`: other names under
    which it may have them. A wrong field reads as 1, so that the next one can be looked at."""

    def __init__(self, fields: Mapping[str, object], file: str) -> None:
        self.fields, self.file = fields, file
        self.defaults: Mapping[str, object] = {}
        self.aliases: Mapping[str, str] = {}
        self.problems: list[Problem] = []
        self.read: set[str] = set()
        self.unused: list[str] = []

    def problem(self, field: str, found: object, needed: str, hint: str = HINT) -> None:
        self.problems.append(Problem(self.file, None, f"{field} = {spell(found)}", needed, hint))

    def get(self, field: str, default: object = None) -> Any:
        """As it stands in the file, else the family's default, else `default`."""
        for name in filter(None, (field, self.aliases.get(field))):
            self.read.add(name)
            if name in self.fields:
                return self.fields[name]
        return self.defaults.get(field, default)

    def ignore(self, *fields: str) -> None:
        """These change nothing in this family, whatever they are."""
        self.read.update(fields)

    def count(self, field: str, most: int = LARGEST_COUNT) -> int:
        value = self.get(field)
        if type(value) is int and 0 < value <= most:
            return value
        upto = "" if most == LARGEST_COUNT else f" up to {most}"
        self.problem(field, value, f"a positive integer{upto}")
        return 1

    def optional_count(self, field: str) -> int | None:
        return None if self.get(field) is None else self.count(field)

    def count_or_zero(self, field: str) -> int:
        """Nothing counts as 0."""
        return self.count(field) if self.get(field) else 0

    def number(self, field: str) -> float:
        return self.positive(field, self.get(field))

    def optional_number(self, field: str) -> float | None:
        return None if self.get(field) is None else self.number(field)

    def positive(self, field: str, value: object) -> float:
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32  # false for NaN
        ):
            return float(value)
        self.problem(field, value, "a positive number")
        return 1.0

    def flag(self, field: str) -> bool:
        value = self.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(field, value, "true or false")
        return False

    def one_of(self, field: str, *allowed: object) -> Any:
        """The value of a field that may have one of a few; the first where it is wrong."""
        value = self.get(field)
        if any(value == one and type(value) is type(one) for one in allowed):
            return value
        self.problem(field, value, " or ".join(map(spell, allowed)))
        return allowed[0]

    def token(self, field: str) -> int | None:
        """A token id; of several (a list is allowed for eos) the first."""
        value = self.get(field)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return None
        if type(value) is int and 0 <= value < LARGEST_COUNT:
            return value
        self.problem(field, value, "a token id or null")
        return None

    def activation(self, field: str = "hidden_act") -> Activation:
        value = self.get(field)
        if isinstance(value, str) and value in ACTIVATIONS:
            return ACTIVATIONS[value]
        self.problem(field, value, " or ".join(map(spell, ACTIVATIONS)))
        return "silu"

    def head_dim(self, hidden: int, heads: int) -> int:
        if self.get("head_dim") is not None:
            return self.count("head_dim")
        if hidden % heads:
            self.problem("hidden_size", hidden, f"a multiple of the {heads} attention heads")
        return max(1, hidden // heads)

    def integers(self, field: str) -> list[int]:
        """A list; an empty one where there is none."""
        value = self.get(field)
        if value is None:
            return []
        if isinstance(value, list) and all(type(one) is int for one in value):
            return value
        self.problem(field, value, "a list of integers or null")
        return []

    def each_layer(self, field: str, layers: int, *known: str) -> list[str] | None:
        """A list with an entry per layer; None where there is none, or it is wrong."""
        kinds = self.get(field)
        if kinds is None:
            return None
        if isinstance(kinds, list) and len(kinds) == layers and all(one in known for one in kinds):
            return kinds
        self.problem(field, kinds, f"one of {', '.join(known)} for each of {layers} layers")
        return None

    def rope(
        self, head_dim: int, *, parts: Mapping[str, Any] | None = None, theta: str = "rope_theta",
        partial: float | None = None, interleaved: bool = False,
    ) -> Rope:  # fmt: skip
        """RoPE of heads of `head_dim`.

        As transformers decides: `rope_scaling` goes before `rope_parameters`, and the theta in that
        object before the flat one. What is overruled must not disagree. `parts` takes their place
        and `theta` names the flat one where a family has several RoPEs. `partial`: share of a head
        that turns where partial_rotary_factor is left out, in a family that reads it.
        """
        if parts is None:
            parts = self._rope_parts()
        kind = self._rope_kind(parts)
        dim, share = self._turned(parts, head_dim, partial)
        numbers = self._rope_numbers(parts, kind)
        if kind == "proportional":
            dim, numbers["turning"] = head_dim, share
        if kind == "longrope":
            numbers |= {name: self._factors(parts, name, dim) for name in LONG_FACTORS}
        known = {
            *("rope_theta", "rope_type", "type", "partial_rotary_factor", "truncate"),
            *("original_max_position_embeddings", *LONG_FACTORS),
            *ROPE_NUMBERS[kind], *ROPE_OPTIONS.get(kind, ()),
        }  # fmt: skip
        self.unused += [f"rope_parameters.{key}" for key in parts if key not in known]
        base = self._theta(parts, theta)
        return Rope(theta=base, dim=dim, kind=kind, interleaved=interleaved, **numbers)

    def _turned(
        self, parts: Mapping[str, Any], head_dim: int, partial: float | None
    ) -> tuple[int, float]:
        """Coordinates of a head that turn, and which share of them that is."""
        usual = self.get("partial_rotary_factor", 1.0 if partial is None else partial)
        share = parts.get("partial_rotary_factor", usual)
        if share is None or (partial is None and share != 1.0):
            self.problem("partial_rotary_factor", share, "1.0", ROPE_HINT)
            share = 1.0
        share = self.positive("partial_rotary_factor", share)
        dim = int(head_dim * share)
        if (dim % 2 or not 0 < dim <= head_dim) and not self.problems:
            name = "head_dim" if share == 1.0 else "partial_rotary_factor"
            needed = "an even number of coordinates of a head (RoPE turns pairs)"
            self.problem(name, head_dim if share == 1.0 else share, needed)
        return dim, share

    def _rope_numbers(self, parts: Mapping[str, Any], kind: RopeKind) -> dict[str, Any]:
        """What a kind of RoPE needs besides theta, and what it may have."""
        found: dict[str, Any] = {
            name: self.positive(f"rope_scaling.{name}", parts.get(name))
            for name in ROPE_NUMBERS[kind]
        }
        for name in ROPE_OPTIONS.get(kind, ()):
            if parts.get(name) is not None:
                found[name] = self.positive(f"rope_scaling.{name}", parts[name])
        if kind in ("llama3", "yarn", "longrope"):
            found["original_length"] = self._original_length(parts)
        if kind == "dynamic":
            found["original_length"] = self.count("max_position_embeddings")
        if kind == "yarn" and parts.get("truncate") is False:
            found["truncate"] = False
        if kind == "longrope":
            longest = self.count("max_position_embeddings")
            found.setdefault("factor", longest / found["original_length"])
        return found

    def _rope_kind(self, parts: Mapping[str, Any]) -> RopeKind:
        found = parts.get("rope_type", parts.get("type", "default"))
        if isinstance(found, str):
            for kind in ROPE_NUMBERS:
                if ROPE_ALIASES.get(found, found) == kind:
                    return kind
        self.problem("rope_type", found, " or ".join(map(spell, ROPE_NUMBERS)), ROPE_HINT)
        return "default"

    def _rope_parts(self) -> Mapping[str, Any]:
        scaling, parameters = self.object("rope_scaling"), self.object("rope_parameters")
        decides = scaling or parameters
        if any(isinstance(part, dict) for part in decides.values()):
            self.problem("rope_parameters", decides, "one RoPE for all layers", ROPE_HINT)
            return {}
        if scaling and "rope_parameters" in self.fields:
            self._check_overruled(scaling, parameters)
        return decides

    def _check_overruled(self, scaling: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        decided = {"rope_theta": self.get("rope_theta"), **scaling, "rope_type": kind}
        for key, value in parameters.items():
            name = "rope_type" if key == "type" else key
            if value != decided.get(name):
                needed = f"{spell(decided.get(name))}, as rope_scaling has it"
                self.problem(f"rope_parameters.{key}", value, needed)

    def _theta(self, parts: Mapping[str, Any], field: str) -> float:
        flat = self.get(field)
        theta = parts.get("rope_theta", flat)
        if field in self.fields and flat is not None and flat != theta:
            self.problem(field, flat, f"the rope_theta of rope_parameters, {spell(theta)}")
        return self.positive(field, theta)

    def object(self, name: str) -> Mapping[str, Any]:
        """An object of the file; an empty one where there is none."""
        parts = self.get(name)
        if parts is None:
            return {}
        if isinstance(parts, dict):
            return parts
        self.problem(name, parts, "an object or null")
        return {}

    def _original_length(self, parts: Mapping[str, Any]) -> int:
        """The flat field goes before the one in `parts`, as transformers has it; both must agree
        where the file has both."""
        name = "original_max_position_embeddings"
        flat, inner = self.get(name), parts.get(name)
        if flat is not None and inner is not None and flat != inner:
            self.problem(name, flat, f"that of rope_parameters, {spell(inner)}")
        length = inner if flat is None else flat
        if length is None:
            length = self.get("max_position_embeddings")
        if type(length) is int and 0 < length < LARGEST_COUNT:
            return length
        self.problem(name, length, "a positive integer")
        return 1

    def _factors(self, parts: Mapping[str, Any], name: str, dim: int) -> tuple[float, ...]:
        found = parts.get(name)
        if not isinstance(found, list) or len(found) != dim // 2:
            self.problem(f"rope_scaling.{name}", found, f"a list of {dim // 2} numbers")
            return ()
        return tuple(self.positive(f"rope_scaling.{name}", value) for value in found)


def spell(value: object) -> str:
    """As JSON spells it, where it is short."""
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 80 else show(value)
