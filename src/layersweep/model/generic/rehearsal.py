"""What a decoder does in each layer, found by running it once without its weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layersweep.model.generic.build import (
    FOREIGN_FAILURES,
    base_of,
    build,
    fill_buffers,
    first_line,
    layers_of,
)  # fmt: skip
from layersweep.model.generic.interfaces import Attend, Sight, Unsupported, shown, visiting
from layersweep.model.generic.mixing import ROWS, Called
from layersweep.model.generic.rotation import Rotation, find_rotation, probed_positions
from layersweep.model.generic.stand_ins import StandIns

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class AttentionSite:
    """A place where a layer attends; `module` is its name in the model.

    `window`, `chunk`: how far back it looks, None for all. `rotation`: how keys are turned, None
    where they depend on positions in a way that nothing here undoes.
    """

    module: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: bool
    rotation: Rotation | None


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer, by the names of its modules in the model.

    `experts`: whose experts come one at a time; `mixers`: that see other tokens in another way
    than by attention, so that they run sequence by sequence.
    """

    module: str
    attention: tuple[AttentionSite, ...]
    experts: tuple[str, ...]
    mixers: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """A decoder: its layers, and the tables (by their modules' names) that it reads before the
    first of them and never again."""

    layers: tuple[LayerParts, ...]
    tables: tuple[str, ...]


def rehearse(config: PreTrainedConfig, longest: int) -> Parts:
    """What a decoder does with sequences of up to `longest` tokens.

    Raises Unsupported, with the reason, for one that cannot run layer by layer on the rows of
    several sequences.
    """
    model = build(config)
    fill_buffers(model, torch.device("cpu"))
    stand_ins, notes = StandIns(model), _Notes()
    layers, names = layers_of(model), {module: name for name, module in model.named_modules()}
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_entering(notes, index))
        for module in layer.modules():
            module.register_forward_hook(notes.keep, with_kwargs=True)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for table in tables:
        table.register_forward_hook(notes.read)
    _run(model, notes, list(range(ROWS)))
    if notes.order != list(range(len(layers))):
        raise Unsupported(
            f"{config.model_type}: found layers called in the order {notes.order}, needed each "
            "once, from the first to the last"
        )
    if not notes.attends:
        raise Unsupported(
            f"{config.model_type}: found no layer that attends through transformers' attention "
            "interface, so that there are no keys and values to keep"
        )
    notes.listening = False
    with torch.no_grad(), visiting(notes):
        mixers = [
            [names[mixer] for child in layer.children() for mixer in _mixers(child, index, notes)]
            for index, layer in enumerate(layers)
        ]
    stand_ins.same = True
    positions = probed_positions(longest)
    keys = _Notes()
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_entering(keys, index))
    _run(model, keys, positions)
    within = {module for layer in layers for module in layer.modules()}
    return Parts(
        tuple(
            _layer_parts(names, index, layer, mixers[index], notes, keys, positions)
            for index, layer in enumerate(layers)
        ),
        tuple(
            names[table]
            for table in tables
            if notes.tables.get(table) == -1 and table not in within
        ),
    )


@dataclass(frozen=True)
class _Attended:
    call: Attend
    query_heads: int
    key: Tensor
    value: Tensor


@dataclass
class _Notes:
    """The visitor of a rehearsal: who was called in which layer, and with what."""

    layer: int = -1
    order: list[int] = field(default_factory=list)
    attends: dict[tuple[int, nn.Module], _Attended] = field(default_factory=dict)
    experts_called: list[tuple[int, nn.Module]] = field(default_factory=list)
    calls: dict[tuple[int, nn.Module], Called] = field(default_factory=dict)
    tables: dict[nn.Module, int] = field(default_factory=dict)
    listening: bool = True

    def read(self, module: nn.Module, args: Any, found: Any) -> None:
        """A forward hook of tables: in which layer one was last read."""
        self.tables[module] = self.layer

    def keep(self, module: nn.Module, args: Any, kwargs: Any, found: Any) -> None:
        """A forward hook."""
        if self.listening:
            self.calls[self.layer, module] = Called(module, args, kwargs, found)

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        if self.listening:
            if (self.layer, module) in self.attends:
                raise Unsupported(
                    f"{type(module).__name__}: found two attention calls in layer {self.layer}, "
                    "needed one for each module"
                )
            heads = q_1QND.shape[1]
            self.attends[self.layer, module] = _Attended(call, heads, k_1GND, v_1GND)
        repeats = q_1QND.shape[1] // v_1GND.shape[1]
        return v_1GND.repeat_interleave(repeats, dim=1) + q_1QND.mean(-1, keepdim=True)

    def sight(self, width: int | None, shows: Any) -> Sight:
        return Sight(width, shown(shows, width))

    def experts(
        self, module: nn.Module, rows_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        if self.listening:
            self.experts_called.append((self.layer, module))
        return rows_NH * weights_NK.sum(1, keepdim=True).to(rows_NH.dtype)


def _entering(notes: _Notes, index: int) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        notes.layer = index
        notes.order.append(index)

    return hook


def _run(model: PreTrainedModel, notes: _Notes, positions: list[int]) -> None:
    """One row batch, with a token of its own per position."""
    _, base = base_of(model)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise Unsupported(
            f"{type(base).__name__}: found a forward pass without position_ids, needed them, "
            "since the rows of several sequences travel together"
        )
    at = torch.tensor([positions])
    ids = 3 + torch.arange(at.numel())[None] % 29
    with torch.no_grad(), visiting(notes):
        try:
            base(input_ids=ids, position_ids=at, use_cache=False)
        except Unsupported:
            raise
        except FOREIGN_FAILURES as failure:
            raise Unsupported(
                f"{type(base).__name__}: does not run on plain rows: {first_line(failure)}"
            ) from failure


def _mixers(part: nn.Module, layer: int, notes: _Notes) -> Iterator[nn.Module]:
    """The largest parts that mix tokens and do not attend; `part` is asked first.

    Raises Unsupported where a part that attends mixes tokens in another way, too.
    """
    called = notes.calls.get((layer, part))
    if called is None:  # a list or a holder of parts that are called by others
        for child in part.children():
            yield from _mixers(child, layer, notes)
        return
    try:
        mixes = called.mixes()
    except FOREIGN_FAILURES as failure:
        raise Unsupported(
            f"{type(part).__name__}: cannot be called by itself: {first_line(failure)}"
        ) from failure
    if not mixes:
        return
    inside = set(part.modules())
    if not any(at == layer and module in inside for at, module in notes.attends):
        yield part
        return
    found = [module for child in part.children() for module in _mixers(child, layer, notes)]
    if not found:
        raise Unsupported(
            f"{type(part).__name__}: found tokens that see each other outside of the attention "
            "function, in a part that attends"
        )
    yield from found


def _layer_parts(
    names: dict[nn.Module, str],
    index: int,
    layer: nn.Module,
    mixers: list[str],
    notes: _Notes,
    keys: _Notes,
    positions: list[int],
) -> LayerParts:
    attention = tuple(
        _site(names[module], seen, keys.attends[at, module].key, positions)
        for (at, module), seen in notes.attends.items()
        if at == index
    )
    experts = tuple(names[module] for at, module in notes.experts_called if at == index)
    return LayerParts(names[layer], attention, experts, tuple(mixers))


def _site(name: str, seen: _Attended, keys: Tensor, positions: list[int]) -> AttentionSite:
    call, sight = seen.call, seen.call.sight
    if sight is not None and sight.kind == "other":
        raise Unsupported(
            f"{name}: found a mask of the model's own, needed causal attention, a window or chunks"
        )
    kind = sight.kind if sight else "window" if call.window else "causal"
    width = sight.width if sight else call.window
    return AttentionSite(
        module=name,
        query_heads=seen.query_heads,
        kv_heads=seen.key.shape[1],
        key_dim=seen.key.shape[3],
        value_dim=seen.value.shape[3],
        window=width if kind == "window" else None,
        chunk=width if kind == "chunk" else None,
        softcap=call.softcap,
        sinks=call.sinks is not None,
        rotation=find_rotation(keys[0, 0], positions),
    )
