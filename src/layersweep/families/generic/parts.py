"""What is known of a decoder that transformers' own modules compute, as data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layersweep.families.weights import BlockShape


@dataclass(frozen=True)
class Turning:
    """Coordinates `first[i]` and `second[i]` of a key turn together, by `speed[i]` radians per
    position; the others stay."""

    first: tuple[int, ...] = ()
    second: tuple[int, ...] = ()
    speed: tuple[float, ...] = ()


@dataclass(frozen=True)
class KeptState:
    """What a layer keeps of all tokens together: `elements` numbers of `bits` bits."""

    name: str
    elements: int
    bits: int


@dataclass(frozen=True)
class GenericLayer:
    """One decoder layer, by the names of its modules in the model.

    `attention`: the module that attends, "" for none; `turning`: of its keys, None where they
    depend on positions in a way that nothing here undoes. `chunk`: tokens see each other within a
    chunk of that many alone. `experts`: the module whose experts come one at a time, "" for none.
    `mixers` let tokens see each other in another way than by attention: they run sequence by
    sequence. `rowwise` compute each row by itself, `attends_in` is the part around attention, which
    can be called for some of the sequences. `states`: of the mixers; None where transformers' cache
    does not say how large they are.
    """

    module: str
    attention: str = ""
    turning: Turning | None = None
    chunk: int | None = None
    experts: str = ""
    mixers: tuple[str, ...] = ()
    rowwise: tuple[str, ...] = ()
    attends_in: str = ""
    states: tuple[KeptState, ...] | None = ()


@dataclass(frozen=True)
class GenericParts:
    """`config`: config.json as transformers reads it. `blocks`: of the whole model in sweep order,
    their keys being names of parameters after `layers[i].module`, or in the model.
    `exact_only`: why codecs cannot be measured here, "" where they can. `text_of`: the model_type
    of a model that reads more than text, of which this is the text part."""

    config: str
    layers: tuple[GenericLayer, ...]
    blocks: tuple[BlockShape, ...]
    exact_only: str = ""
    text_of: str = ""
