"""Which tiles a process computes where several share a study: whole tiles, so that no number
depends on how many there are. Arithmetic alone: nobody has to ask anybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layersweep.errors import InputError


@dataclass(frozen=True)
class Shard:
    """Process `number` (from 1) of `of` that share a study.

    `local_rank` of `local_size` of them run on this host and share its memory. `source`: what
    says so, for messages.
    """

    number: int = 1
    of: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: str = ""

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> str:
        """Name of its folder beside those of the others."""
        return f"{self.number}-of-{self.of}"

    @property
    def has_gate(self) -> bool:
        """Whether the gate rides here: once per host, where there is least to compute."""
        return self.local_rank == self.local_size - 1

    def choose(self, costs: Sequence[float]) -> list[int]:
        """Indices of its tiles, in order; `costs` are of all tiles."""
        return share(costs, self.of)[self.number - 1]


WHOLE = Shard()


def share(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Split tiles among processes: the dearest first, each to who has least; the process with most
    comes first. Lists of indices in order, every index in one of them."""
    piles: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = loads.index(min(loads))
        piles[least].append(index)
        loads[least] += costs[index]
    order = sorted(range(processes), key=lambda pile: -loads[pile])
    return [sorted(piles[pile]) for pile in order]


def parse_shard(text: str) -> Shard:
    """ "2/8": the second of eight processes, each on a host of its own. Raises InputError."""
    number, slash, of = text.partition("/")
    good = bool(slash) and number.isdecimal() and of.isdecimal()
    if not good or not 1 <= int(number) <= int(of):
        raise InputError(
            f"--shard: found '{text}', needed i/n with i from 1 to n",
            hint="--shard 1/4 to --shard 4/4 are the four parts of a study",
        )
    return Shard(int(number), int(of), source="--shard")


def shard_of_rank(environment: Mapping[str, str]) -> Shard | None:
    """The shard of a process that torchrun or Slurm's srun started as one of several, else None.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. srun sets SLURM_PROCID and,
    for its steps alone, SLURM_STEP_NUM_TASKS: the SLURM_NTASKS of a batch script is no reason to
    compute a part. Raises InputError for values that are no ranks.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    for names in (torchrun, srun):
        if names[0] not in environment or names[1] not in environment:
            continue
        found = [environment.get(name, "") for name in names]
        values = [text.partition("(")[0].partition(",")[0] for text in found]  # "2(x3)" a node
        if not all(value.isdecimal() for value in values[:2]):
            raise InputError(
                f"{names[0]}, {names[1]}: found '{found[0]}', '{found[1]}', needed whole numbers",
                hint=f"unset {names[0]}, or start with torchrun or srun",
            )
        rank, size = int(values[0]), int(values[1])
        local = [int(value) if value.isdecimal() else None for value in values[2:]]
        if size == 1:
            return None
        return Shard(rank + 1, size, local[0] or 0, local[1] or 1, source=names[0])
    return None
