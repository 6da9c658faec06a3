"""What a rehearsal notes while transformers' forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from layersweep.families.generic.build import FOREIGN_FAILURES, first_line
from layersweep.families.generic.interfaces import Attend, Sight, Unsupported, shown
from layersweep.families.generic.mixing import Called

When = Literal["before", "between", "after"]


@dataclass(frozen=True)
class Attended:
    """One call of the attention function."""

    call: Attend
    query_heads: int
    key: Tensor
    value: Tensor


@dataclass
class LayerNotes:
    """Of one layer: who attends, who has routed experts (and how many a token gets), the part
    around attention, and the parts that mix tokens or compute each row by itself."""

    attends: dict[nn.Module, Attended] = field(default_factory=dict)
    experts: dict[nn.Module, int] = field(default_factory=dict)
    mixers: list[nn.Module] = field(default_factory=list)
    rowwise: list[nn.Module] = field(default_factory=list)
    attending: nn.Module | None = None


class Notes:
    """The visitor of a rehearsal. With `judging`, a layer's calls are kept until it is left, which
    is when its parts are looked at. `outside`: when modules beside the layers computed."""

    def __init__(self, layers: list[nn.Module], *, judging: bool = True) -> None:
        self.layers, self.judging = layers, judging
        self.order: list[int] = []
        self.of_layer = [LayerNotes() for _ in layers]
        self.outside: dict[nn.Module, When] = {}
        self._inside = False
        self._calls: dict[nn.Module, Called] = {}
        self._listening = True

    @contextmanager
    def listening_to(self, model: nn.Module) -> Iterator[None]:
        """Its forward pass is noted."""
        within = {part for layer in self.layers for part in layer.modules()}
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
                if part not in within and next(part.parameters(recurse=False), None) is not None:
                    leave.callback(part.register_forward_hook(self._outside).remove)
            yield

    @property
    def _now(self) -> LayerNotes:
        return self.of_layer[self.order[-1]]

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        if self._listening:
            if module in self._now.attends:
                where = f"{type(module).__name__} in layer {self.order[-1]}"
                raise Unsupported(where, "two attention calls", "one")
            heads = q_1QND.shape[1]
            self._now.attends[module] = Attended(call, heads, k_1GND, v_1GND)
        repeats = q_1QND.shape[1] // v_1GND.shape[1]
        return v_1GND.repeat_interleave(repeats, dim=1) + q_1QND.mean(-1, keepdim=True)

    def sight(self, width: int | None, shows: Any) -> Sight:
        return Sight(width, shown(shows, width) if self.judging else "")

    def experts(
        self, module: nn.Module, rows_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        if self._listening:
            self._now.experts[module] = experts_NK.numel() // len(rows_NH)
        much = weights_NK.reshape(len(rows_NH), -1).sum(1, keepdim=True)
        return rows_NH * much.to(rows_NH.dtype)

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        self.order.append(index)
        self._inside = True

    def _outside(self, module: nn.Module, args: Any, found: Any) -> None:
        after = len(self.order) == len(self.layers) and not self._inside
        now: When = "before" if not self.order else "after" if after else "between"
        # what is needed twice would have to be read twice
        self.outside[module] = now if self.outside.get(module, now) == now else "between"

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, found: Any) -> None:
        if self._listening:
            self._calls[module] = Called(module, args, kwargs, found)

    def _leave(self, module: nn.Module, args: Any, found: Any) -> None:
        self._inside = False
        if self.judging and self._listening:
            self._listening = False
            for child in module.children():
                self._judge(child)
            self._calls.clear()
            self._listening = True

    def _judge(self, part: nn.Module) -> None:
        """Note what a part does, or what the parts of it do.

        Raises Unsupported where a part that attends mixes tokens in another way, too.
        """
        noted, inside = self._now, set(part.modules())
        attends, routes = (bool(inside & of.keys()) for of in (noted.attends, noted.experts))
        if part not in self._calls:  # a list, or a holder of parts that others call
            self._judge_children(part)
            return
        mixes = self._mixes(part)
        if not attends and not routes:
            (noted.mixers if mixes else noted.rowwise).append(part)
            return
        if attends and not routes:
            noted.attending = noted.attending or part
            if not mixes and self._calls[part].counts():
                raise Unsupported(
                    type(part).__name__, "positions that it counts row by row", "position_ids"
                )
        if not mixes and not routes:
            return
        before = len(noted.mixers)
        self._judge_children(part)
        if mixes and len(noted.mixers) == before:
            raise Unsupported(
                type(part).__name__, "tokens that see each other outside of the attention function",
                "no such thing in a part that attends",
            )  # fmt: skip
        if attends and not routes:  # its own rows are called together
            noted.rowwise = [part for part in noted.rowwise if part not in inside]

    def _judge_children(self, part: nn.Module) -> None:
        for child in part.children():
            self._judge(child)

    def _mixes(self, part: nn.Module) -> bool:
        try:
            return self._calls[part].mixes()
        except FOREIGN_FAILURES as failure:
            raise Unsupported(
                type(part).__name__, first_line(failure), "a part that can be called by itself"
            ) from failure
