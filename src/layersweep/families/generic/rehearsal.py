"""What a decoder does in each layer, found by running it once without its weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from layersweep.families.generic.build import (
    FOREIGN_FAILURES,
    base_of,
    build,
    fill_buffers,
    first_line,
    layers_of,
)
from layersweep.families.generic.interfaces import OWN_MASK, Unsupported, visiting
from layersweep.families.generic.mixing import ROWS
from layersweep.families.generic.notes import Attended, LayerNotes, Notes
from layersweep.families.generic.parts import GenericLayer, KeptState
from layersweep.families.generic.rotation import find_turning, probed_positions
from layersweep.families.generic.stand_ins import StandIns
from layersweep.families.generic.states import states_of
from layersweep.families.spec import Attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Rehearsed:
    """A decoder: each layer's parts, attention (None where it has none) and routed experts per
    token (0 where it has none); `first`: modules beside the layers that compute before them."""

    layers: tuple[tuple[GenericLayer, Attention | None, int], ...]
    first: frozenset[str]


def rehearse(config: PreTrainedConfig, longest: int) -> Rehearsed:
    """What a decoder does with sequences of up to `longest` tokens.

    Raises Unsupported, with the reason, for one that cannot run layer by layer on the rows of
    several sequences.
    """
    model = build(config)
    fill_buffers(model, torch.device("cpu"))
    stand_ins, names = StandIns(model), {part: name for name, part in model.named_modules()}
    layers, positions = list(layers_of(model)), probed_positions(longest)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors all the way: others would wait for each other
    try:
        notes = Notes(layers)
        _run(model, notes, list(range(ROWS)))
        stand_ins.same = True
        keys = Notes(layers, judging=False)
        _run(model, keys, positions)
    finally:
        torch.set_num_threads(threads)
    _check(config.model_type, notes)
    first = {names[part] for part, when in notes.outside.items() if when == "before"}
    mixing = any(noted.mixers for noted in notes.of_layer)
    states = (mixing and states_of(config, len(layers))) or [()] * len(layers)
    return Rehearsed(
        tuple(
            _layer(names, layer, noted, keys.of_layer[index], positions, states[index])
            for index, (layer, noted) in enumerate(zip(layers, notes.of_layer, strict=True))
        ),
        frozenset(first),
    )


def _layer(
    names: dict[nn.Module, str],
    layer: nn.Module,
    noted: LayerNotes,
    keys: LayerNotes,
    positions: list[int],
    states: tuple[KeptState, ...],
) -> tuple[GenericLayer, Attention | None, int]:
    for what, found in (("attention", noted.attends), ("experts", noted.experts)):
        if len(found) > 1:
            raise Unsupported(names[layer], f"{len(found)} modules with {what}", "at most one")
    attention, parts = None, GenericLayer(names[layer])
    for module, seen in noted.attends.items():
        attention, chunk = _attention(names[module], seen)
        turning = find_turning(keys.attends[module].key[0, 0], positions)
        parts = replace(parts, attention=names[module], chunk=chunk, turning=turning)
    per_token = 0
    for module, count in noted.experts.items():
        parts, per_token = replace(parts, experts=names[module]), count
    return replace(
        parts,
        attends_in=names[noted.attending] if noted.attending else "",
        mixers=tuple(names[part] for part in noted.mixers),
        rowwise=tuple(names[part] for part in noted.rowwise),
        states=(states or None) if noted.mixers else (),
    ), attention, per_token  # fmt: skip


def _check(kind: str, notes: Notes) -> None:
    if notes.order != list(range(len(notes.layers))):
        order = f"layers called in the order {notes.order}"
        raise Unsupported(kind, order, "each once, from the first to the last")
    between = sorted(type(part).__name__ for part, at in notes.outside.items() if at == "between")
    if between:
        raise Unsupported(kind, f"{between[0]} between two layers", "nothing there")
    if not any(noted.attends for noted in notes.of_layer):
        raise Unsupported(
            kind, "no layer that attends through transformers' attention interface",
            "one, since its keys and values are what is studied",
        )  # fmt: skip


def _run(model: PreTrainedModel, notes: Notes, positions: list[int]) -> None:
    """One row batch, with a token of its own per position."""
    _, base = base_of(model)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise Unsupported(
            type(base).__name__, "a forward pass without position_ids",
            "them, since the rows of several sequences travel together",
        )  # fmt: skip
    at = torch.tensor([positions])
    ids = 3 + torch.arange(at.numel())[None] % 29
    with torch.no_grad(), visiting(notes), notes.listening_to(model):
        try:
            base(input_ids=ids, position_ids=at, use_cache=False)
        except Unsupported:
            raise
        except FOREIGN_FAILURES as failure:
            raise Unsupported(
                type(base).__name__, first_line(failure), "a model that runs on plain rows"
            ) from failure


def _attention(name: str, seen: Attended) -> tuple[Attention, int | None]:
    """How a module attends, and within chunks of how many tokens."""
    call, sight = seen.call, seen.call.sight
    if sight is not None and sight.kind == "other":
        raise Unsupported(name, OWN_MASK, "causal attention, a window or chunks")
    kind = sight.kind if sight else "window" if call.window else "causal"
    width = sight.width if sight else call.window
    attention = Attention(
        num_heads=seen.query_heads,
        num_kv_heads=seen.key.shape[1],
        head_dim=seen.key.shape[3],
        value_dim=seen.value.shape[3],
        scale=call.scale,
        rope=None,
        window=width if kind == "window" else None,
        softcap=call.softcap,
        sinks=call.sinks is not None,
    )
    return attention, width if kind == "chunk" else None
