"""What walks over the weights cost at least, from sizes alone, and what some of them took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from layersweep.families.spec import Decoder
from layersweep.generate.counts import Rider
from layersweep.kv.arms import Arm
from layersweep.kv.methods import EXACT_BITS
from layersweep.kv.size import kv_size
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.shapes import TileShape, dense_elements, tile_flops
from layersweep.sweep.model import Model
from layersweep.sweep.streams import layer_streams


@dataclass(frozen=True)
class Rates:
    """Of the machine, measured in the same process: bytes per second that its memory moves and that
    weights are brought at (over the bus; on the CPU, from the page cache), FLOP per second of
    products; None where it was not asked for."""

    memory: float
    bring: float
    products: float | None


@dataclass(frozen=True)
class WalkCost:
    """What one walk cannot do without."""

    read_bytes: float
    flops: float


class Costs:
    """Of walks of one model. `keeps_dense`: products read weights that were decoded once; else the
    packed ones are the least that can be read."""

    def __init__(self, model: Model, *, keeps_dense: bool, tokens: int) -> None:
        self.decoder, self.element = model.decoder, model.compute.dtype.itemsize
        self._tokens = tokens
        self._bytes = {
            role: sum(self._size(spec, keeps_dense) for spec in model.specs if spec.role == role)
            for role in {spec.role for spec in model.specs}
        }
        self._of_arm: dict[Arm, float] = {}

    def _size(self, spec: BlockSpec, dense: bool) -> int:
        return dense_elements(spec.shape, self.element) * self.element if dense else spec.nbytes

    def of(self, riders: Sequence[Rider]) -> WalkCost:
        """Of a walk with these texts."""
        rows = sum(rider.tokens for rider in riders)
        return WalkCost(self.weight_bytes(rows) + self._history(riders), self._flops(riders, rows))

    def weight_bytes(self, rows: int) -> float:
        """Of all weights that `rows` rows go through, once. Of routed experts, those that are used
        if every row chooses evenly: top_k of them for one row, all for many."""
        always = sum(size for role, size in self._bytes.items() if role not in ("embed", "expert"))
        embedded = rows * self.decoder.hidden_size * self.element
        return always + embedded + self._bytes.get("expert", 0) * share_used(self.decoder, rows)

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


def share_used(decoder: Decoder, rows: int) -> float:
    """Of routed experts, the share that at least one of `rows` rows goes to if all are as likely:
    1 - (1 - k / E)^rows."""
    routers = [layer.feed for layer in decoder.layers if layer.feed.router]
    if not routers:
        return 0.0
    chances = [feed.router.top_k / feed.experts for feed in routers if feed.router]
    return sum(1 - (1 - chance) ** rows for chance in chances) / len(chances)


@dataclass
class Walks:
    """Some walks of a scheduler, summed. `phases`: seconds by the device's clock. `floor_s`: the
    least that they could take, see `add`."""

    walks: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    floor_s: float = 0.0
    missed_bytes: int = 0
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
        self.read_bytes += cost.read_bytes
        self.flops += cost.flops

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s if self.wall_s else 0.0

    @property
    def share_of_floor(self) -> float:
        """1 where the walks took no longer than their floor."""
        return self.floor_s / self.wall_s if self.wall_s else 0.0
