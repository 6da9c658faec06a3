"""Which tiles a process computes where several share a study: whole tiles, so that no number
depends on how many there are. Arithmetic alone: nobody has to ask anybody."""

from __future__ import annotations

import re
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
    """Split tiles among processes: largest tile first, to the least-loaded process. The most loaded
    process comes first. Lists of indices in order; each index is in one of them."""
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
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for names in (torchrun, srun):
        if names[0] not in environment or names[1] not in environment:
            continue
        rank, size, local_rank = (_whole(name, environment) for name in names)
        _check_rank(names[0], rank, names[1], size)
        if size == 1:
            return None
        slurm = names is srun
        here = _tasks_here(environment) if slurm else _whole("LOCAL_WORLD_SIZE", environment)
        here_name = "SLURM_STEP_TASKS_PER_NODE" if slurm else "LOCAL_WORLD_SIZE"
        if here_name in environment:
            _check_rank(names[2], local_rank, here_name, here)
        return Shard(rank + 1, size, local_rank, max(1, here), source=names[0])
    return None


def _check_rank(name: str, rank: int, size_name: str, size: int) -> None:
    if rank >= size:
        raise InputError(
            f"{name}: found '{rank}' with {size_name} {size}, needed a rank below that",
            hint=f"unset {name}, or start with torchrun or srun",
        )


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Of a srun step on this node: SLURM_STEP_TASKS_PER_NODE is "3(x2),1" for 3, 3 and 1."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = environment.get(name, "1")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise InputError(
                f"{name}: found '{text}', needed counts such as 3(x2),1",
                hint=f"unset {name}, or start with srun",
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(_whole("SLURM_NODEID", environment), len(counts) - 1)]


def _whole(name: str, environment: Mapping[str, str]) -> int:
    """A variable's number, 0 where it is not set."""
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise InputError(
            f"{name}: found '{text}', needed a whole number",
            hint=f"unset {name}, or start with torchrun or srun",
        )
    return int(text)
