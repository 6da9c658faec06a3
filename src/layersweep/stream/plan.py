"""The plan: where bytes go, how many sweeps it takes, and what that costs. Pure arithmetic.

Everything follows from the checkpoint's headers, the shapes of the tiles and the budgets, so
a request that cannot fit is refused before a weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.errors import BudgetError
from layersweep.families.spec import Decoder
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.runs import (
    Placement,
    Run,
    choose_spread,
    compute_ring,
    runs_of,
    staging_ring,
)
from layersweep.stream.shapes import (
    Machine,
    TileShape,
    dense_bytes,
    fit_bytes,
    kept_bytes,
    most_experts_at_once,
    scratch_bytes,
    temporary_bytes,
    tile_bytes,
    tile_flops,
)
from layersweep.units import format_bytes

# cuBLAS workspaces (32 MiB on Hopper), rotary tables, token ids, the allocator's rounding.
FIXED_BYTES = 160 * 2**20
LANE_BYTES = 64 * 2**20  # workspaces of each thread that generates, or walks through modules
CPU_FIXED_BYTES = 256 * 2**20
# Ring of pinned host memory between file and device: enough runs for eight readers.
HOST_RING = 2**30


@dataclass(frozen=True)
class Plan:
    """`sweeps[i]` are the tiles (by index) of sweep i. `reads`, `copies` and `sweep_flops` have an
    entry per walk over the weights, first the sweeps, then further walks: bytes from files, bytes
    to the device, operations (0 for a further walk). `peaks` sums to `device_bytes`.
    `keeps_normed`: tiles keep the rows that a layer's experts see."""

    sweeps: tuple[tuple[int, ...], ...]
    peaks: dict[str, int]
    placement: Placement
    host_kept_bytes: int
    device_kept_bytes: int
    weight_bytes: int
    reads: tuple[int, ...]
    copies: tuple[int, ...]
    sweep_flops: tuple[float, ...]
    vram: int
    ram: int
    keeps_normed: bool = False

    @property
    def bytes_to_read(self) -> int:
        """From the files, in all sweeps."""
        return sum(self.reads)

    @property
    def bytes_to_copy(self) -> int:
        """To the device, in all sweeps; 0 on the CPU."""
        return sum(self.copies)

    @property
    def flops(self) -> float:
        return sum(self.sweep_flops)

    @property
    def device_bytes(self) -> int:
        return sum(self.peaks.values())

    @property
    def scratch(self) -> int:
        """Bytes of the buffer that attention, experts and head share."""
        return self.peaks["scratch"]

    @property
    def host_bytes(self) -> int:
        """Host memory for weights: the ring and what is kept."""
        return self.placement.host_ring + self.host_kept_bytes

    @property
    def host(self) -> str:
        """Where weights wait between sweeps, in the words of results.json."""
        kept = self.device_kept_bytes + self.host_kept_bytes
        if self.device_kept_bytes >= self.weight_bytes or (
            not self.placement.device_ring and kept >= self.weight_bytes
        ):
            return "resident"
        if not self.placement.device_ring:
            return "ring" if kept else "disk"
        return "pinned" if kept >= self.weight_bytes else "ring"


def make_plan(
    decoder: Decoder,
    specs: Sequence[BlockSpec],
    tiles: Sequence[TileShape],
    machine: Machine,
    at_least: int = 1,
    units: Sequence[Sequence[int]] | None = None,
    further: int = 0,
    reference: TileShape | None = None,
) -> Plan:
    """Cut `tiles` into sweeps that fit the machine's budgets, and place the weights. Rows that
    experts see are kept where products gather them and that costs no walk and no byte read.

    `at_least`: the fewest sweeps, if there are as many tiles. For generation, `units` are tiles (by
    index) that share no sweep with another unit, and each unit gets `at_least` sweeps; `further`
    counts the walks over all weights after the sweeps, a token per branch in each. `reference`: a
    tile that rides on every sweep (sweep/reference.py).

    On the CPU both budgets are host memory and `vram` bounds the working set alone. Raises
    BudgetError with needed, available and what would fit.
    """
    args = decoder, runs_of(specs), tiles, machine, at_least, units, further, reference
    plain = _planned(*args, keeps_normed=False)
    if not (machine.grouped and _groups_normed(decoder, machine)):
        return plain
    try:
        keeping = _planned(*args, keeps_normed=True)
    except BudgetError:
        return plain
    same = (keeping.reads, keeping.copies) == (plain.reads, plain.copies)
    return keeping if same else plain


def _groups_normed(decoder: Decoder, machine: Machine) -> bool:
    """Whether experts that are visited together see rows that are made for them."""
    if decoder.generic:  # its modules hold them
        return False
    return most_experts_at_once(decoder, machine.element, cpu=machine.cpu) > 1


def _planned(
    decoder: Decoder, runs: Sequence[Run], tiles: Sequence[TileShape], machine: Machine,
    at_least: int, units: Sequence[Sequence[int]] | None, further: int,
    reference: TileShape | None, *, keeps_normed: bool,
) -> Plan:  # fmt: skip
    def held_by(tile: TileShape) -> int:
        return tile_bytes(decoder, tile, machine.element, keeps_normed=keeps_normed)

    whole = sum(run.nbytes for run in runs)
    host_ring = host_ring_bytes(runs, machine)
    peaks = _peaks(decoder, runs, [*tiles, *([reference] if reference else [])], machine)
    if reference:
        peaks["reference text"] = held_by(reference)
        peaks["temporaries"] = max(
            peaks["temporaries"], fit_bytes(decoder, reference, cpu=machine.cpu)
        )
    walk = LANE_BYTES if decoder.generic and not machine.cpu else 0
    sizes = [held_by(tile) + walk for tile in tiles]
    fixed, biggest = sum(peaks.values()), max(sizes, default=0)
    if fixed + biggest > machine.vram:
        needed = format_bytes(fixed + biggest)
        raise BudgetError(
            f"--vram: available {format_bytes(machine.vram)}, needed {needed} for one tile",
            hint=f"--vram {needed.replace(' ', '')}, fewer arms in --kv, or a smaller "
            "--niah-context",
        )
    sweeps = _sweeps(sizes, machine.vram - fixed, at_least, units)
    held = max(sum(sizes[index] for index in sweep) for sweep in sweeps)
    walks = len(sweeps) + further
    room = machine.vram - fixed - held
    if walks > 1 and room + peaks.get("weights in flight", 0) >= whole:
        room += peaks.pop("weights in flight", 0)  # what stays needs no ring
    placement = place(runs, machine, host_ring, room if walks > 1 else None)
    on_device = sum(runs[index].nbytes for index in placement.device)
    if on_device:
        peaks["weights kept"] = on_device
    again = [run for run in runs if run.index not in placement.device]
    from_disk = [run for run in again if run.index not in placement.host]
    repeats = walks - 1
    flops = [tile_flops(decoder, tile) for tile in tiles]
    copied = [whole, *[sum(run.nbytes for run in again)] * repeats]
    return Plan(
        sweeps=sweeps,
        peaks={"hidden states": held, **peaks},
        placement=placement,
        host_kept_bytes=sum(runs[index].nbytes for index in placement.host),
        device_kept_bytes=on_device,
        weight_bytes=whole,
        reads=(
            sum(run.stored_bytes for run in runs),
            *[sum(run.stored_bytes for run in from_disk)] * repeats,
        ),
        copies=(0,) * walks if machine.cpu else tuple(copied),
        sweep_flops=(
            *(sum(flops[index] for index in sweep) for sweep in sweeps),
            *[0.0] * further,
        ),
        vram=machine.vram,
        ram=machine.ram,
        keeps_normed=keeps_normed,
    )


def _peaks(
    decoder: Decoder, runs: Sequence[Run], tiles: Sequence[TileShape], machine: Machine
) -> dict[str, int]:
    """Device memory besides hidden states, by what it is for."""
    peaks = {
        "dense weights": dense_bytes(decoder, machine.element, cpu=machine.cpu),
        "scratch": scratch_bytes(decoder, tiles, machine),
        "temporaries": temporary_bytes(decoder, tiles, machine),
        "fixed": CPU_FIXED_BYTES if machine.cpu else FIXED_BYTES,
    }
    if not machine.cpu:
        peaks["weights in flight"] = min(compute_ring(runs), sum(run.nbytes for run in runs))
        if machine.lanes:
            peaks["lanes"] = machine.lanes * LANE_BYTES
            peaks["kept caches at work"] = kept_bytes(decoder, tiles, machine)
        if machine.context:
            peaks["CUDA context"] = machine.context
    return peaks


def host_ring_bytes(runs: Sequence[Run], machine: Machine) -> int:
    """Host memory that runs pass through: to the device, or to be used there on the CPU."""
    whole = sum(run.nbytes for run in runs)
    if machine.cpu:
        wanted = least = min(compute_ring(runs), whole)
        use = "for one layer and two runs of blocks ahead"
    else:
        least = min(staging_ring(runs), whole)
        wanted = max(least, min(HOST_RING // machine.sharers, whole, machine.ram))
        use = "for two runs of blocks between file and device"
    if least > machine.ram:
        raise BudgetError(
            f"--ram: available {format_bytes(machine.ram)}, needed {format_bytes(least)} {use}",
            hint=f"--ram {format_bytes(least).replace(' ', '')} or more",
        )
    return wanted


def place(runs: Sequence[Run], machine: Machine, host_ring: int, room: int | None) -> Placement:
    """Where runs wait. `room`: device bytes that nothing else needs; None for a single sweep, which
    keeps nothing."""
    sizes = [run.nbytes for run in runs]
    ring = min(compute_ring(runs), sum(sizes))
    device: frozenset[int] = frozenset()
    host: frozenset[int] = frozenset()
    if room is not None:
        if not machine.cpu:
            device = choose_spread(sizes, room)
        rest = [index for index in range(len(sizes)) if index not in device]
        store = machine.ram - host_ring if machine.sharers == 1 else 0  # else: the page cache
        kept = choose_spread([sizes[index] for index in rest], store)
        host = frozenset(rest[index] for index in kept)
    held = machine.sharers * host_ring + sum(sizes[index] for index in host)
    return Placement(
        device=device,
        host=host,
        device_ring=0 if machine.cpu or len(device) == len(runs) else ring,
        host_ring=host_ring,
        drop_cache=machine.sharers * machine.ram - held < sum(sizes),
    )


def _sweeps(
    sizes: Sequence[int], room: int, at_least: int, units: Sequence[Sequence[int]] | None
) -> tuple[tuple[int, ...], ...]:
    if units is None:
        return cut(sizes, room, at_least)
    parts = ((unit, cut([sizes[index] for index in unit], room, at_least)) for unit in units)
    return tuple(tuple(unit[at] for at in sweep) for unit, sweeps in parts for sweep in sweeps)


def cut(sizes: Sequence[int], room: int, at_least: int = 1) -> tuple[tuple[int, ...], ...]:
    """Consecutive tiles per sweep: as few sweeps as fit `room`, or `at_least`, and those as even
    as they can be, which leaves the most memory for weights that stay."""
    fewest = max(at_least, len(_greedy(sizes, room)))
    low, high = max(sizes, default=0), room
    while low < high:  # the smallest room that needs no more sweeps
        middle = (low + high) // 2
        if len(_greedy(sizes, middle)) > fewest:
            low = middle + 1
        else:
            high = middle
    return _greedy(sizes, high)


def _greedy(sizes: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    sweeps: list[list[int]] = [[]]
    used = 0
    for index, size in enumerate(sizes):
        if sweeps[-1] and used + size > room:
            sweeps.append([])
            used = 0
        sweeps[-1].append(index)
        used += size
    return tuple(tuple(sweep) for sweep in sweeps)
