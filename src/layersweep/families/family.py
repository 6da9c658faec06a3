"""What a family is: how its config is read, and what its weights are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from layersweep.families.fields import Fields
from layersweep.families.names import Names
from layersweep.families.spec import Decoder


@dataclass(frozen=True)
class Family:
    """`read` turns config.json into a Decoder, and leaves what is wrong in the Fields. `defaults`:
    of fields that a file may leave out, as transformers has them. `aliases`: field -> the other
    name under which a file may have it."""

    model_type: str
    architecture: str
    read: Callable[[Fields], Decoder]
    names: Names
    defaults: Mapping[str, object] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
