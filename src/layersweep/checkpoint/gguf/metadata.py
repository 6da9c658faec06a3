"""The metadata of a GGUF file, read key by key: what nobody asks for is refused with its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from layersweep.checkpoint.gguf.header import Value
from layersweep.checkpoint.header import StoredTensor
from layersweep.problems import Problem, show

ARCHITECTURE = "general.architecture"
HINT = "the file says something that this model family is not computed with so far"


@dataclass
class Metadata:
    """Keys of one architecture ("llama.block_count" is asked for as "block_count"). A wrong value
    reads as 1 or 0, so that the next one can be looked at."""

    fields: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]
    file: str
    architecture: str
    problems: list[Problem] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def problem(self, key: str, found: object, needed: str, hint: str = HINT) -> None:
        self.problems.append(Problem(self.file, key, show(found), needed, hint))

    def get(self, key: str) -> Value | None:
        name = f"{self.architecture}.{key}"
        self.read.add(name)
        return self.fields.get(name)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer. A list of one for each layer must have the same in all."""
        found = self.get(key)
        if isinstance(found, list) and found and all(one == found[0] for one in found):
            found = found[0]
        if found is None and default is not None:
            return default
        if type(found) is int and 0 < found < 2**31:
            return found
        self.problem(f"{self.architecture}.{key}", found, "a positive integer, one for all layers")
        return 1

    def optional_count(self, key: str) -> int | None:
        """None where it is left out or 0."""
        return self.count(key) if self.get(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, as the shortest decimal of the float32 in the file."""
        found = self.get(key)
        if found is None and default is not None:
            return default
        if isinstance(found, int | float) and not isinstance(found, bool):
            value = float(str(np.float32(found)))
            if 0 < value < math.inf:
                return value
        self.problem(f"{self.architecture}.{key}", found, "a positive number")
        return 1.0

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        found = self.get(key)
        if found is None or isinstance(found, bool):
            return bool(found)
        self.problem(f"{self.architecture}.{key}", found, "true or false")
        return False

    def only(self, key: str, *allowed: Value | None) -> None:
        """A key that says nothing new: it is left out, or one of a few values."""
        found = self.get(key)
        if found is not None and found not in allowed:
            needed = " or ".join(str(one) for one in allowed if one is not None) or "nothing"
            self.problem(f"{self.architecture}.{key}", found, needed)

    def token(self, key: str) -> int | None:
        """A token's id under "tokenizer.ggml."."""
        found = self.fields.get(f"tokenizer.ggml.{key}")
        return found if type(found) is int else None

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    def check_unread(self) -> None:
        """Keys of the architecture that nobody asked for."""
        for name, value in self.fields.items():
            if name.startswith(f"{self.architecture}.") and name not in self.read:
                self.problem(name, value, "a key that is known here")
