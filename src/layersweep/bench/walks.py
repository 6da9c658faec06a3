"""What walks over the weights cost at least, from sizes alone, and what some of them took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layersweep.families.spec import Decoder
from layersweep.generate.counts import Rider
from layersweep.generate.room import Room
from layersweep.kv.arms import Arm
from layersweep.kv.methods import EXACT_BITS
from layersweep.kv.size import kv_size
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.shapes import TileShape, dense_elements, tile_flops
from layersweep.sweep.model import Model
from layersweep.sweep.streams import layer_streams


@dataclass(frozen=True)
class Rates:
    """Of the machine, measured in the same process: bytes per second that its memory moves, and
    that weights are brought at (over the bus; on the CPU, from the page cache); FLOP per second of
    products, None where only bytes are counted."""

    memory: float
    bring: float
    products: float | None


@dataclass(frozen=True)
class WalkCost:
    """What one walk cannot do without. `needed_bytes`: of packed weights that it visits."""

    read_bytes: float
    needed_bytes: float
    flops: float


class Costs:
    """Of walks of one model whose texts end with `tokens` tokens. In `room`, products read weights
    that were decoded once, or packed ones, which are the least that can be read; experts are
    fetched by id, or all of them are brought in every walk."""

    def __init__(self, model: Model, room: Room, tokens: int) -> None:
        self.decoder, self.element = model.decoder, model.compute.dtype.itemsize
        self._tokens, self._by_id = tokens, room.slots > 0
        on_host = model.cpu  # where files are read; a copy to a device has padding, too
        self._packed = _by_role(model, lambda one: one.stored_bytes if on_host else one.nbytes)
        self._read = _by_role(model, self._dense) if room.keeps_dense else self._packed
        self._of_arm: dict[Arm, float] = {}

    def _dense(self, spec: BlockSpec) -> int:
        return dense_elements(spec.shape, self.element) * self.element

    def of(self, riders: Sequence[Rider]) -> WalkCost:
        """Of a walk with these texts. Routed experts count as if every row chose evenly: top_k of
        them for one row, all for many."""
        rows = sum(rider.tokens for rider in riders)
        used = share_used(self.decoder, rows)
        embedded = rows * self.decoder.hidden_size * self.element
        read = embedded + self._read["always"] + used * self._read["expert"]
        needed = (used if self._by_id else 1.0) * self._packed["expert"]
        needed += self._packed["embed"] + self._packed["always"]
        return WalkCost(read + self._history(riders), needed, self._flops(riders, rows))

    def _history(self, riders: Sequence[Rider]) -> float:
        """Keys and values that are attended to, in the form that the arm keeps them in."""
        return sum(self._kv_bytes(one.arm) * (one.past + one.tokens) for one in riders)

    def _kv_bytes(self, arm: Arm) -> float:
        """Of a token, at the length that texts have at the end."""
        if arm not in self._of_arm:
            size = kv_size(arm, layer_streams(self.decoder), self._tokens)
            exact = 8 * self.element / EXACT_BITS if arm.codec is None else 1.0
            self._of_arm[arm] = size.nbytes * exact / self._tokens
        return self._of_arm[arm]

    def _flops(self, riders: Sequence[Rider], rows: int) -> float:
        shape = TileShape(
            "walk", rows, max(one.past + one.tokens for one in riders),
            tuple((one.past, one.tokens, 1) for one in riders), len(riders), 1, 1, 1, 1,
        )  # fmt: skip
        return tile_flops(self.decoder, shape)


def _by_role(model: Model, size: Callable[[BlockSpec], int]) -> dict[str, int]:
    """Bytes of the embedding, of routed experts, and of what every row goes through."""
    found = {"embed": 0, "expert": 0, "always": 0}
    for spec in model.specs:
        found[spec.role if spec.role in found else "always"] += size(spec)
    return found


def share_used(decoder: Decoder, rows: int) -> float:
    """Of routed experts, the share that at least one of `rows` rows goes to if all are as likely:
    1 - (1 - k / E)^rows."""
    feeds = [layer.feed for layer in decoder.layers]
    chances = [feed.router.top_k / feed.experts for feed in feeds if feed.router]
    return sum(1 - (1 - chance) ** rows for chance in chances) / len(chances) if chances else 0.0


@dataclass
class Walks:
    """Some walks of a scheduler, summed. `phases`: seconds by the device's clock. `floor_s`: the
    least that they could take, see `add`."""

    walks: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    floor_s: float = 0.0
    missed_bytes: int = 0
    needed_bytes: float = 0.0
    read_bytes: float = 0.0
    flops: float = 0.0
    launch_s: float = 0.0
    copy_s: float = 0.0
    stall_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    def add(self, cost: WalkCost, missed: int, rates: Rates) -> None:
        """A walk's floor. Where products are counted, the longest of bringing what was missed,
        reading and computing, which can go on at once. One stream computes next to nothing, and
        what it misses is known only once its router has chosen: bringing and reading add up."""
        bring, read = missed / rates.bring, cost.read_bytes / rates.memory
        if rates.products is None:
            self.floor_s += bring + read
        else:
            self.floor_s += max(bring, read, cost.flops / rates.products)
        self.walks += 1
        self.missed_bytes += missed
        self.needed_bytes += cost.needed_bytes
        self.read_bytes += cost.read_bytes
        self.flops += cost.flops

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s if self.wall_s else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the weights' bytes that were where they are used."""
        return 1 - self.missed_bytes / self.needed_bytes if self.walks else 0.0

    @property
    def share_of_floor(self) -> float:
        """1 where the walks took no longer than their floor."""
        return self.floor_s / self.wall_s if self.wall_s else 0.0
