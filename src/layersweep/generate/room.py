"""How much may run at once: memory for weights, for the rows of a walk, and for what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from layersweep.errors import BudgetError, Fallback, InputError
from layersweep.kv.arms import EXACT, Arm
from layersweep.kv.codec import check_stream
from layersweep.stream.blocks import BlockSpec, split_experts
from layersweep.stream.experts import slot_bytes
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.shapes import dense_total, most_experts_at_once
from layersweep.sweep.engine import Engine
from layersweep.sweep.generic_limits import KEEPS_NOTHING
from layersweep.sweep.model import Model
from layersweep.sweep.running import Text, capacity_for, row_bytes
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile
from layersweep.sweep.shapes import length_limit
from layersweep.sweep.streams import every_stream
from layersweep.units import format_bytes

MOST = 256  # requests that run at once
ROWS = 4096  # tokens that are read in one walk, if there is memory for them
FEWEST_ROWS = 64
SPARE = 1.15  # shelves have rows that nobody uses


@dataclass(frozen=True)
class Room:
    """Where bytes go. `plan`: of all weights, or, with `slots`, of all but routed experts, which
    have so many places on the device and `home_bytes` of host memory. `keeps_dense`: weights are
    decoded once and stay so. `kept_bytes`: for keys and values on the device; `host_bytes`: in host
    memory, of requests that are set back. `most` requests run at once, `rows` of their tokens are
    read in one walk, and none is longer than `longest` tokens."""

    plan: Plan
    keeps_dense: bool
    slots: int
    home_bytes: int
    kept_bytes: int
    host_bytes: int
    most: int
    rows: int
    longest: int

    @property
    def host(self) -> str:
        """Where weights wait, in words."""
        if self.slots:
            return f"{self.plan.host}, {self.slots} experts at a time, by id"
        return self.plan.host

    def open(self, model: Model, say: Callable[[Fallback], None]) -> Engine:
        """Take the memory of the plan, but for keys and values."""
        return model.open(
            self.plan, say, keeps_dense=self.keeps_dense, slots=self.slots,
            home_bytes=self.home_bytes,
        )  # fmt: skip


def make_room(
    model: Model, *, most: int = MOST, longest: int | None = None, every_row: bool = False
) -> Room:
    """Where a model's weights and the texts that run go.

    Weights stay on the device as far as they fit beside `most` texts of `longest` tokens (the
    model's limit by default), or half of what is free; what is left then is for more texts. Where
    they do not all fit, routed experts are fetched by id. `every_row`: logits of all tokens may be
    wanted, not of each text's last alone. Raises InputError for a decoder that transformers' own
    layers compute, BudgetError for what cannot fit.
    """
    decoder = model.decoder
    if decoder.generic:
        raise InputError(KEEPS_NOTHING, hint="`layersweep plan` says which families have one")
    if model.beside:
        raise InputError(
            "generation: found several devices, needed one", hint=f"--device {model.compute.device}"
        )
    limit, field = length_limit(decoder)
    longest = longest or limit
    if longest > limit:
        raise InputError(
            f"found texts of {longest} tokens, needed at most {limit}, the model's limit ({field} "
            "in config.json)"
        )
    row = row_bytes(decoder, capacity_for(longest, longest), model.machine.element)
    walk, free = _walk(model, most, longest, row, every_row)
    if free < row:
        raise BudgetError(
            f"--vram: available {format_bytes(max(free, 0))} for keys and values, needed "
            f"{format_bytes(row)} for one text of {longest} tokens",
            hint="a larger --vram, or a smaller --max-length",
        )
    wanted = max(row, min(most * row, free // 2))
    packed, dense = sum(spec.nbytes for spec in model.specs), dense_total(decoder, walk.element)
    here = 0 if model.cpu else packed  # on the CPU they are used where they wait
    all_fit = walk.plan(wanted).host == "resident" and here + wanted <= free
    keeps_dense = all_fit and here + dense + wanted <= free
    if all_fit:
        kept = min(ceil(SPARE * most * row), free - here - (dense if keeps_dense else 0))
        plan = walk.plan(kept + (dense if keeps_dense else 0))
        slots = home = 0
    else:
        kept = wanted
        plan, slots, home = _by_id(walk, kept)
    peaks = {**plan.peaks, "keys and values": kept, "tokens seen": walk.seen_bytes}
    if keeps_dense:
        peaks["weights decoded"] = dense
    if slots and not model.cpu:
        peaks["experts"] = slots * walk.slot_bytes
    plan = replace(plan, peaks=peaks, vram=model.machine.vram)
    beside = plan.host_bytes + home + (model.machine.vram if model.cpu else 0)
    host = max(0, model.machine.ram - beside)
    return Room(plan, keeps_dense, slots, home, kept, host, most, walk.rows, longest)


def text_bytes(model: Model, text: Text, tokens: int) -> float:
    """What a text takes on the device with so many tokens."""
    row = row_bytes(model.decoder, capacity_for(tokens, text.reach), model.machine.element)
    return SPARE * row + text.packed_bytes


def check_arm(model: Model, arm: Arm) -> None:
    """Raises InputError for an arm that cannot keep the model's keys and values."""
    compute = model.compute
    arm.check_model(model.decoder.num_hidden_layers, model.checkpoint.fingerprint)
    for codec in arm.codecs:
        for stream in every_stream(model.decoder):
            check_stream(codec, stream, compute.device, compute.dtype)


@dataclass(frozen=True)
class _Walk:
    """What a walk over the weights computes with: it reads `rows` tokens and gives `most` texts a
    token each. `every_row`: see make_room."""

    model: Model
    most: int
    rows: int
    longest: int
    every_row: bool

    @property
    def element(self) -> int:
        return self.model.machine.element

    @property
    def seen_bytes(self) -> int:
        """What the sampler holds where a repetition penalty is asked for."""
        return self.most * self.model.decoder.vocab_size

    @property
    def slot_bytes(self) -> int:
        return slot_bytes(split_experts(self.model.specs)[1])

    def plan(self, kept: int, specs: Sequence[BlockSpec] | None = None) -> Plan:
        """Beside `kept` bytes of the device, of this walk and of more walks; of all weights, or of
        some blocks."""
        model, each = self.model, min(self.rows, self.longest)
        machine = replace(model.machine, vram=model.machine.vram - kept - self.seen_bytes)
        read = Branch(EXACT, (0,) * each, (0 if self.every_row else each - 1, each))
        step = Branch(EXACT, (0,), (0, 1))
        prompts = (BranchedSequence((), (read,), self.longest - each),) * -(-self.rows // each)
        steps = (BranchedSequence((), (step,), self.longest - 1),) * self.most
        tiles = [model.shape(Tile("prompts", prompts)), model.shape(Tile("steps", steps))]
        # what the texts of a tile read is read together
        shapes = [replace(tile, read_each=tile.read_rows) for tile in tiles]
        plan = make_plan(
            model.decoder, specs or model.specs, shapes, machine, further=1,
            reference=model.reference_shape,
        )  # fmt: skip
        if len(plan.sweeps) > 1:
            raise BudgetError(
                f"--vram: available {format_bytes(machine.vram)}, needed more for {self.most} "
                f"requests at once and {self.rows} tokens that are read with them",
                hint="a larger --vram, or a smaller --max-running",
            )
        return plan


def _walk(model: Model, most: int, longest: int, row: int, every_row: bool) -> tuple[_Walk, int]:
    """As many rows in a walk as leave room for a text of `row` bytes, and the bytes that are free
    beside it and no weights."""
    rows = ROWS
    while True:
        walk = _Walk(model, most, rows, longest, every_row)
        try:
            base = walk.plan(0)
            free = base.vram - (base.device_bytes - base.peaks.get("weights kept", 0))
        except BudgetError:
            if rows <= FEWEST_ROWS:
                raise
            free = 0
        if free >= row or rows <= FEWEST_ROWS:
            return walk, free
        rows //= 2


def _by_id(walk: _Walk, kept: int) -> tuple[Plan, int, int]:
    """The plan of what every token uses, places for experts, and bytes of their home; the plan of
    all weights and no places where experts would have too few."""
    model = walk.model
    always, routed = split_experts(model.specs)
    least = most_experts_at_once(model.decoder, walk.element, cpu=model.cpu) + 1
    if not routed:
        return walk.plan(kept), 0, 0
    size, everything = walk.slot_bytes, len(routed)
    plan = walk.plan(kept, always)
    if model.cpu:
        slots = (model.machine.ram - plan.host_bytes) // size
        found = plan, min(slots, everything), 0
    else:
        slots = (plan.vram - plan.device_bytes) // size
        home = min(sum(spec.nbytes for spec in routed), model.machine.ram - plan.host_bytes - size)
        found = plan, min(slots, everything), max(0, home)
    return found if found[1] >= least and plan.host == "resident" else (walk.plan(kept), 0, 0)
