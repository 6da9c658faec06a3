"""What a decoder does in each layer, found by running it once without its weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
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
    stand_ins, names = StandIns(model), {part: name for name, part in model.named_modules()}
    layers, positions = layers_of(model), probed_positions(longest)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors all the way: others would wait for each other
    try:
        notes = _Notes(layers)
        _run(model, notes, list(range(ROWS)))
        stand_ins.same = True
        keys = _Notes(layers, judging=False)
        _run(model, keys, positions)
    finally:
        torch.set_num_threads(threads)
    _check(config.model_type, notes)
    within = {module for layer in layers for module in layer.modules()}
    return Parts(
        tuple(
            LayerParts(
                names[layer],
                tuple(
                    _site(names[module], seen, keys.attends[at, module].key, positions)
                    for (at, module), seen in notes.attends.items()
                    if at == index
                ),
                tuple(names[module] for at, module in notes.experts_called if at == index),
                tuple(names[module] for at, module in notes.mixers if at == index),
            )
            for index, layer in enumerate(layers)
        ),
        tuple(
            names[table]
            for table, layer in notes.tables.items()
            if layer == -1 and table not in within
        ),
    )


def _check(kind: str, notes: _Notes) -> None:
    if notes.order != list(range(len(notes.layers))):
        raise Unsupported(
            f"{kind}: found layers called in the order {notes.order}, needed each once, from the "
            "first to the last"
        )
    if not notes.attends:
        raise Unsupported(
            f"{kind}: found no layer that attends through transformers' attention interface, so "
            "that there are no keys and values to keep"
        )


@dataclass(frozen=True)
class _Attended:
    call: Attend
    query_heads: int
    key: Tensor
    value: Tensor


class _Notes:
    """The visitor of a rehearsal: who was called in which layer, and with what.

    With `judging`, calls are kept until their layer is left, which is when its mixers are found.
    """

    def __init__(self, layers: list[nn.Module], *, judging: bool = True) -> None:
        self.layers, self.judging = layers, judging
        self.layer = -1
        self.order: list[int] = []
        self.attends: dict[tuple[int, nn.Module], _Attended] = {}
        self.experts_called: list[tuple[int, nn.Module]] = []
        self.mixers: list[tuple[int, nn.Module]] = []
        self.tables: dict[nn.Module, int] = {}
        self._calls: dict[nn.Module, Called] = {}
        self._listening = True

    @contextmanager
    def listening_to(self, model: nn.Module) -> Iterator[None]:
        """Its forward pass is noted."""
        with ExitStack() as leave:
            for index, layer in enumerate(self.layers):
                hooks = [layer.register_forward_pre_hook(partial(self._enter, index))]
                if self.judging:
                    hooks += [
                        part.register_forward_hook(self._keep, with_kwargs=True)
                        for part in layer.modules()
                    ]
                hooks.append(layer.register_forward_hook(self._leave))
                for hook in hooks:
                    leave.callback(hook.remove)
            for part in model.modules():
                if isinstance(part, nn.Embedding):
                    leave.callback(part.register_forward_hook(self._read).remove)
            yield

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        if self._listening:
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
        return Sight(width, shown(shows, width) if self.judging else "")

    def experts(
        self, module: nn.Module, rows_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        if self._listening:
            self.experts_called.append((self.layer, module))
        return rows_NH * weights_NK.sum(1, keepdim=True).to(rows_NH.dtype)

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        self.layer = index
        self.order.append(index)

    def _read(self, module: nn.Module, args: Any, found: Any) -> None:
        self.tables[module] = self.layer  # the last to read it

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, found: Any) -> None:
        if self._listening:
            self._calls[module] = Called(module, args, kwargs, found)

    def _leave(self, module: nn.Module, args: Any, found: Any) -> None:
        if self.judging and self._listening:
            self._listening = False
            for child in module.children():
                self.mixers += [(self.layer, part) for part in self._mixing(child)]
            self._calls.clear()
            self._listening = True

    def _mixing(self, part: nn.Module) -> Iterator[nn.Module]:
        """The largest parts that mix tokens and do not attend; `part` is asked first.

        Raises Unsupported where a part that attends mixes tokens in another way, too.
        """
        if part not in self._calls:  # a list, or a holder of parts that others call
            for child in part.children():
                yield from self._mixing(child)
            return
        try:
            mixes = self._calls[part].mixes()
        except FOREIGN_FAILURES as failure:
            raise Unsupported(
                f"{type(part).__name__}: cannot be called by itself: {first_line(failure)}"
            ) from failure
        if not mixes:
            return
        inside = set(part.modules())
        if not any(at == self.layer and module in inside for at, module in self.attends):
            yield part
            return
        found = [mixer for child in part.children() for mixer in self._mixing(child)]
        if not found:
            raise Unsupported(
                f"{type(part).__name__}: found tokens that see each other outside of the "
                "attention function, in a part that attends"
            )
        yield from found


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
    with torch.no_grad(), visiting(notes), notes.listening_to(model):
        try:
            base(input_ids=ids, position_ids=at, use_cache=False)
        except Unsupported:
            raise
        except FOREIGN_FAILURES as failure:
            raise Unsupported(
                f"{type(base).__name__}: does not run on plain rows: {first_line(failure)}"
            ) from failure


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
