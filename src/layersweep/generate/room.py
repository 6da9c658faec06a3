"""How much may run at once: memory for weights, for the rows of a walk, and for what is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

from layersweep.errors import BudgetError, InputError
from layersweep.kv.arms import EXACT, Arm
from layersweep.kv.codec import check_stream
from layersweep.stream.plan import Plan, make_plan
from layersweep.stream.shapes import dense_total
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
ENOUGH = 8  # full-length texts that make room for others beside weights that could stay


@dataclass(frozen=True)
class Room:
    """`keeps_dense`: weights are decoded once and stay so. `kept_bytes`: for keys and values on the
    device; `host_bytes`: in host memory, of requests
    that are set back. `most` requests run at once, `rows` of their tokens are read in one walk,
    and none is longer than `longest` tokens."""

    plan: Plan
    keeps_dense: bool
    kept_bytes: int
    host_bytes: int
    most: int
    rows: int
    longest: int


def make_room(
    model: Model, *, most: int = MOST, longest: int | None = None, every_row: bool = False
) -> Room:
    """Where a model's weights and the texts that run go.

    Weights stay on the device as far as they fit beside one text of `longest` tokens (the model's
    limit by default); what is left then, and no less than that text, is for keys and values.
    `every_row`: logits of all tokens may be wanted, not of each text's last alone. Raises
    InputError for a decoder that transformers' own layers compute, BudgetError for what cannot fit.
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
    rows = ROWS
    while True:
        try:
            base = _plan(model, 0, most, rows, longest, every_row)
        except BudgetError:
            if rows <= FEWEST_ROWS:
                raise
            rows //= 2
            continue
        free = base.vram - (base.device_bytes - base.peaks.get("weights kept", 0))
        if free >= row or rows <= FEWEST_ROWS:
            break
        rows //= 2
    if free < row:
        raise BudgetError(
            f"--vram: available {format_bytes(max(free, 0))} for keys and values, needed "
            f"{format_bytes(row)} for one text of {longest} tokens",
            hint="a larger --vram, or a smaller --max-length",
        )
    wanted = min(most, ENOUGH) * row
    packed = 0 if model.cpu else base.weight_bytes  # on the CPU they are used where they wait
    dense = dense_total(decoder, model.machine.element)
    keeps_dense = base.host == "resident" and free >= packed + dense + wanted
    spare = free - packed - (dense if keeps_dense else 0)
    kept = min(most * row, max(row, spare, min(wanted, free // 2)))
    taken = kept + dense if keeps_dense else kept
    plan = _plan(model, taken, most, rows, longest, every_row)
    peaks = {**plan.peaks, "keys and values": kept}
    if keeps_dense:
        peaks["weights decoded"] = dense
    plan = replace(plan, peaks=peaks, vram=model.machine.vram)
    beside = plan.host_bytes + (model.machine.vram if model.cpu else 0)
    return Room(plan, keeps_dense, kept, max(0, model.machine.ram - beside), most, rows, longest)


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


def _plan(model: Model, kept: int, most: int, rows: int, longest: int, every_row: bool) -> Plan:
    """Of a walk that reads `rows` tokens and gives `most` texts a token each, and of more walks."""
    machine = replace(model.machine, vram=model.machine.vram - kept)
    each = min(rows, longest)
    read = Branch(EXACT, (0,) * each, (0 if every_row else each - 1, each))
    step = Branch(EXACT, (0,), (0, 1))
    tiles = [
        Tile("prompts", (BranchedSequence((), (read,), longest - each),) * -(-rows // each)),
        Tile("steps", (BranchedSequence((), (step,), longest - 1),) * most),
    ]
    # what the texts of a tile read is read together
    shapes = [replace(shape, read_each=shape.read_rows) for shape in map(model.shape, tiles)]
    plan = make_plan(
        model.decoder, model.specs, shapes, machine, further=1, reference=model.reference_shape
    )
    if len(plan.sweeps) > 1:
        raise BudgetError(
            f"--vram: available {format_bytes(machine.vram)}, needed more for {most} requests at "
            f"once and {rows} tokens that are read with them",
            hint="a larger --vram, or a smaller --max-running",
        )
    return plan
