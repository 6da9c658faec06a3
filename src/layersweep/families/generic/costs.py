"""How many bytes transformers' modules hold at once while they compute a tile.

Measured, not guessed: a forward pass on the meta device, on which tensors have sizes and no
memory, tells what lives together. A sweep calls some parts with all rows of a tile, others with
some rows at a time, so bytes are counted by whose call made them.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layersweep.families.generic.alike import gate_of, rms_norms
from layersweep.families.generic.build import (
    FOREIGN_FAILURES,
    base_of,
    build,
    config_of,
    first_line,
    layers_of,
)
from layersweep.families.generic.interfaces import Attend, Sight, visiting
from layersweep.families.generic.mixing import tensors_in
from layersweep.families.generic.parts import GenericLayer

# As sweep/generic_rows.py calls a part: with all rows of a tile, with some sequences and their
# branches, with some rows, with whole sequences of one branch each.
Call = Literal["tile", "group", "rows", "sequences"]

_ROWS = 2048  # of the probe: chunks of recurrences are no longer, and divide it


@dataclass(frozen=True)
class Moment:
    """Bytes that live together, per row that a call of each kind is made with. `out_...`: of what
    such calls return, for all rows of a tile, in which they put their parts together."""

    tile: float = 0.0
    group: float = 0.0
    rows: float = 0.0
    sequences: float = 0.0
    out_group: float = 0.0
    out_rows: float = 0.0
    out_sequences: float = 0.0


@dataclass(frozen=True)
class Costs:
    """`between`: bytes per row that a tile holds between two layers; `at_experts`: while it waits
    for a layer's experts, 0 where there are none; `expert`: of what one makes of a row beside its
    products. `moments`:
    those that are not below another in all; `attending`: those at which attention is computed.
    `chunk`: tokens to whose multiples recurrences pad a sequence. `guessed`: why all this was not
    measured, "" where it was."""

    between: float
    at_experts: float
    expert: float
    moments: tuple[Moment, ...]
    attending: tuple[Moment, ...]
    chunk: int
    guessed: str = ""


@lru_cache(maxsize=8)
def costs_of(
    config: str, layers: tuple[GenericLayer, ...], after: tuple[str, ...], element: int,
    kernels: bool,
) -> Costs:  # fmt: skip
    """Of a decoder that computes in numbers of `element` bytes. `config`, `layers`: see
    GenericParts; `after`: names of parameters that are used behind the layers; `kernels`: they
    compute norms."""
    dtype = torch.float32 if element == 4 else torch.bfloat16
    try:
        whole, single = (
            _measured(config, layers, after, dtype, rows, kernels=kernels) for rows in (_ROWS, 1)
        )
    except FOREIGN_FAILURES as failure:  # it asks for numbers, which are not there
        return _guess(config, element, first_line(failure))
    moments = _per_row(whole.moments)
    slope = max((moment.sequences for moment in moments), default=0.0)
    alone = max((moment.sequences for moment in single.moments), default=0.0)
    return Costs(
        whole.between / _ROWS,
        whole.at_experts / _ROWS,
        max((_expert_bytes(of, dtype) for of in whole.sets_of_experts), default=0.0),
        moments,
        _per_row(whole.attending),
        chunk=_power_of_two(alone / slope) if slope else 1,
    )


def _expert_bytes(experts: Any, dtype: torch.dtype) -> float:
    """Per row: what gate and activation make of the first product."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    shape = getattr(experts, name).shape[1:]
    wide = shape[-1] if experts.is_transposed else shape[0]
    if gate_of(experts, dtype, wide // 2):
        return 0.0  # in place
    meter = _Meter(experts.parameters())
    with torch.device("meta"):
        inner = torch.empty(_ROWS, wide, dtype=dtype)
    with torch.no_grad(), meter:
        _ = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    return max(moment.tile for moment in meter.moments) / _ROWS


def _power_of_two(least: float) -> int:
    """Chunks are such numbers of tokens; less than a chunk is found where some of what lives is
    not padded."""
    return int(2 ** math.ceil(math.log2(max(least, 1.0)) - 1e-9))


def _guess(config: str, element: int, why: str) -> Costs:
    """More than most decoders need: what is as wide as the hidden states a few times over, and what
    is as wide as the widest matrix."""
    model = build(config_of(json.loads(config)))
    hidden = model.config.get_text_config().hidden_size * element
    widest = max(max(x.shape[-2:]) for x in layers_of(model).parameters() if x.ndim > 1)
    inside = Moment(tile=8.0 * hidden, rows=4.0 * (widest * element + hidden))
    attending = Moment(tile=8.0 * hidden, group=4.0 * (widest * element + hidden))
    held = 6.0 * hidden
    expert = 4.0 * widest * element
    return Costs(held, held, expert, (inside,), (attending,), chunk=1, guessed=why)


def _per_row(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    return tuple(Moment(*(size / _ROWS for size in astuple(one))) for one in moments)


def _measured(
    config: str,
    known: tuple[GenericLayer, ...],
    after: tuple[str, ...],
    dtype: torch.dtype,
    rows: int,
    *,
    kernels: bool,
) -> _Meter:
    model = build(config_of(json.loads(config)), dtype)
    _, base = base_of(model)
    layers = layers_of(model)
    del layers[_kinds_within(known, layers) :]  # as the modules of a sweep do
    with torch.device("meta"):
        ids = torch.zeros(1, rows, dtype=torch.long)
    meter = _Meter([*model.parameters(), *model.buffers(), ids])
    named = dict(model.named_modules())
    owners = {key if key in named else key.rpartition(".")[0] for key in after}
    behind = [name for name in owners if named[name] in set(base.modules())]
    meter.wrap("rows", (named[name] for name in behind))
    for layer, of in zip(layers, known, strict=False):
        layer.register_forward_pre_hook(meter.pass_layer)
        layer.register_forward_hook(meter.pass_layer)
        meter.wrap("rows", (named[name] for name in of.rowwise))
        meter.wrap("sequences", (named[name] for name in of.mixers))
        meter.wrap("group", (named[name] for name in [of.attends_in] if name))
    for norm in rms_norms(model) if kernels else ():
        norm.forward = torch.empty_like  # all that a kernel makes
    with torch.no_grad(), visiting(meter), meter:
        base(input_ids=ids, position_ids=ids, use_cache=False)
    return meter


def _kinds_within(known: tuple[GenericLayer, ...], layers: Iterable[nn.Module]) -> int:
    """Layers from the first one on, among which there is one of each kind that is not the first of
    all: a second layer has both its input and the embeddings around it."""
    kinds: dict[object, int] = {}
    for index, (of, layer) in enumerate(zip(known, layers, strict=True)):
        shapes = tuple(tuple(one.shape) for one in layer.parameters())
        kind = bool(of.attention), len(of.mixers), bool(of.experts), shapes
        if index or len(known) == 1:
            kinds.setdefault(kind, index)
    return max(kinds.values()) + 1


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations make, by the innermost call around them, and forgets it as it dies.
    It is the visitor of the forward pass, too."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.between = self.at_experts = 0
        self.sets_of_experts: list[nn.Module] = []
        self.moments: list[Moment] = []
        self.attending: list[Moment] = []
        self._calls: list[Call] = ["tile"]
        self._live: dict[Call, int] = {"tile": 0, "group": 0, "rows": 0, "sequences": 0}
        self._maker: dict[int, Call] = {}
        self._given = {one.untyped_storage()._cdata for one in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # a question about numbers: whether positions jump, or pass a limit
        if func is torch.ops.aten.nonzero.default:  # of rows: all may be chosen
            func, args = _all_places, args[:1]
        found = func(*args, **(kwargs or {}))
        for one in tensors_in(found):
            self._count(one.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        at, size = storage._cdata, storage.nbytes()
        if at in self._maker or at in self._given:
            return
        self._maker[at] = self._calls[-1]
        self._live[self._calls[-1]] += size

        def gone() -> None:
            self._live[self._maker.pop(at)] -= size

        weakref.finalize(storage, gone)
        _keep(self.moments, Moment(**self._live))

    def wrap(self, call: Call, parts: Iterable[nn.Module]) -> None:
        """Calls of these parts are noted as such."""
        for part in parts:
            part.forward = partial(self._called, call, part.forward)

    def _called(self, call: Call, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outside = self.moments, self.attending
        self.moments, self.attending = [], []
        gathered = sum(one.nbytes for one in tensors_in((args, kwargs)))
        gathered *= call == "sequences"  # whose rows lie elsewhere in the tile: they are copied
        self._live[call] += gathered
        self._calls.append(call)
        found = forward(*args, **kwargs)
        self._calls.pop()
        self._live[call] -= gathered
        out = self._handed_over(found)
        for before, inside in zip(outside, (self.moments, self.attending), strict=True):
            for one in inside:
                name = f"out_{call}"
                _keep(before, replace(one, **{name: getattr(one, name) + out}))
        self.moments, self.attending = outside
        return found

    def _handed_over(self, found: Any) -> int:
        """What a call returns belongs to the one around it; its bytes."""
        out = 0
        for one in tensors_in(found):
            at, size = one.untyped_storage()._cdata, one.untyped_storage().nbytes()
            if at in self._maker:
                self._live[self._maker[at]] -= size
                self._maker[at] = self._calls[-1]
                self._live[self._calls[-1]] += size
                out += size
        return out

    def pass_layer(self, *call: Any) -> None:
        self.between = max(self.between, sum(self._live.values()))

    def attend(
        self, module: nn.Module, q_1QND: Tensor, k_1GND: Tensor, v_1GND: Tensor, call: Attend
    ) -> Tensor:
        heads, rows, width = q_1QND.shape[1], q_1QND.shape[2], v_1GND.shape[3]
        out = q_1QND.new_empty(1, rows, heads, width)
        _keep(self.attending, Moment(**self._live))
        return out.transpose(1, 2)

    def sight(self, width: int | None, shows: Any) -> Sight:
        return Sight(width)

    def experts(
        self, module: nn.Module, rows_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        self.sets_of_experts.append(module)
        sums = torch.zeros_like(rows_NH)
        self.at_experts = max(self.at_experts, sum(self._live.values()))
        return sums


def _all_places(mask: Tensor) -> Tensor:
    return torch.empty(mask.numel(), mask.ndim, dtype=torch.long, device="meta")


def _keep(moments: list[Moment], new: Moment) -> None:
    """Add one, unless another has as much of everything."""
    sizes = astuple(new)

    def below(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True))

    if not any(below(sizes, astuple(one)) for one in moments):
        moments[:] = [one for one in moments if not below(astuple(one), sizes)]
        moments.append(new)
