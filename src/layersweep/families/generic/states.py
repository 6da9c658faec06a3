"""How much layers keep beside keys and values: the states of recurrences and convolutions.

transformers' own cache tells, once a forward pass has filled it. That pass runs on the meta device,
in bfloat16: shapes and dtypes without numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layersweep.families.generic.build import FOREIGN_FAILURES, base_of, build, layers_of
from layersweep.families.generic.interfaces import visiting
from layersweep.families.generic.notes import Notes
from layersweep.families.generic.parts import KeptState

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TOKENS = 5
# by the names that transformers' layers of a cache have for them
_KINDS = {"conv_states": "convolution", "recurrent_states": "recurrence"}


def states_of(config: PreTrainedConfig, count: int) -> list[tuple[KeptState, ...]] | None:
    """Of each of `count` layers, for one sequence; None where the model's cache is none that
    transformers has for all models, or where the model cannot run without numbers."""
    from transformers import DynamicCache

    model = build(config, torch.bfloat16)
    _, base = base_of(model)
    cache = DynamicCache(config=model.config)
    known = inspect.signature(base.forward).parameters
    given = {"cache" if "cache" in known else "past_key_values": cache}
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    notes = Notes(list(layers_of(model)), judging=False)
    try:
        with torch.no_grad(), visiting(notes), notes.listening_to(model):
            base(input_ids=ids, position_ids=ids, use_cache=True, **given)
    except FOREIGN_FAILURES:
        return None
    if len(cache.layers) != count:
        return None
    return [tuple(_states_in(layer)) for layer in cache.layers]


def _states_in(layer: Any) -> Iterator[KeptState]:
    for kind, name in _KINDS.items():
        for state in getattr(layer, kind, {}).values():
            if isinstance(state, Tensor):
                yield KeptState(name, state.numel(), 8 * state.itemsize)
