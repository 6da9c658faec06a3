"""Generated answers: every token walks over all weights.

Transfers dominate, because a token is little arithmetic. So as many weights as fit stay on the
device. If several devices hold them together, each holds a share of the layers, and units of tiles
move from one device to the next, one unit on each at a time. Keys and values are kept between the
walks, in host memory where the devices have no room.

A unit's first walks read prefixes, as many tiles at a time as memory holds. Each further walk takes
all of its tiles, because a token takes almost no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from layersweep.stream.plan import Plan
from layersweep.stream.rates import STEP_SECONDS, sweep_seconds
from layersweep.sweep.sequences import Tile
from layersweep.tasks.needle.task import NEW_TOKENS


@dataclass(frozen=True)
class Stage:
    """The layers that a device holds."""

    layers: range
    plan: Plan

    @property
    def resident(self) -> bool:
        """Whether its weights are read once and stay."""
        return self.plan.device_kept_bytes + self.plan.host_kept_bytes == self.plan.weight_bytes

    @property
    def on_device(self) -> bool:
        """Whether its weights stay on the device that computes with them."""
        return self.resident and not any(self.plan.copies[1:])


@dataclass(frozen=True)
class Unit:
    """Tiles that are generated together. `first`: the tiles of each first walk; the gate may ride
    in a walk without tiles."""

    first: list[list[Tile]]

    @property
    def tiles(self) -> list[Tile]:
        return [tile for tiles in self.first for tile in tiles]

    @property
    def walks(self) -> int:
        """Over all weights: the first ones, and one for each further token."""
        return len(self.first) + NEW_TOKENS - 1


@dataclass(frozen=True)
class Generation:
    """How the answers of some tiles are generated. `offload`: caches wait in host memory, at most
    `cache_bytes` of them."""

    stages: list[Stage]
    units: list[Unit]
    offload: bool
    cache_bytes: int

    @property
    def walks(self) -> int:
        return sum(unit.walks for unit in self.units)

    def seconds(
        self, device: str, gemm_flops: float, h2d: float | None, disk: float | None = None
    ) -> float:
        """First walks take what sweeps from the page cache take. A further walk takes the longest
        of three: the host's launches, weights and caches over the bus, reads from disk. Rates are
        of one device."""
        first = max(
            sum(sweep_seconds(s.plan, device, gemm_flops * self.lanes, h2d)[: len(s.plan.sweeps)])
            for s in self.stages
        )
        further, layer_s = (NEW_TOKENS - 1) * len(self.units), STEP_SECONDS[device]
        steps = sum(layer_s[0] + layer_s[1] * len(unit.tiles) for unit in self.units)
        steps *= (NEW_TOKENS - 1) * sum(len(stage.layers) for stage in self.stages)
        moved = max(sum(s.plan.copies[len(s.plan.sweeps) :]) for s in self.stages)
        read = max(sum(s.plan.reads[len(s.plan.sweeps) :]) for s in self.stages)
        if self.offload:
            moved += self.unit_cache_bytes * further // self.lanes
        over_the_bus = moved / h2d if h2d else 0.0
        again = read / disk if disk else 0.0
        return first + max(steps, over_the_bus, again)

    @property
    def unit_cache_bytes(self) -> int:
        """Of one unit."""
        return self.cache_bytes // self.lanes

    @property
    def lanes(self) -> int:
        """Units in progress at once: one per stage, so that no device idles."""
        return min(len(self.stages), len(self.units))
