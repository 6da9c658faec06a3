"""Rates of machines, as assumed for plans. Nothing here was measured by this project unless a
line says so; `layersweep doctor` measures the machine at hand."""

from __future__ import annotations

from dataclasses import dataclass

from layersweep.stream.plan import Plan
from layersweep.units import parse_size

# A layer in a walk for generated tokens, and each tile in it, where launches decide, as measured on
# one machine each: two cores, an H100's host.
STEP_SECONDS = {"cpu": (0.013, 0.034), "cuda": (0.0065, 0.0035)}
# Share of the rate of its largest product that a whole sweep reaches (docs/performance.md).
SWEEP_EFFICIENCY = {"cpu": 0.4, "cuda": 0.88}


@dataclass(frozen=True)
class MachineRates:
    """What a plan needs to know of a machine. Rates in bytes/s and FLOP/s, sizes in bytes.

    `repeats_kv`: its attention needs keys and values once per query head (below sm_80).
    """

    name: str
    device: str
    devices: int
    vram: int
    ram: int
    gemm_flops: float
    h2d: float
    disk: float
    download: float = 100e6
    source: str = "assumed"
    repeats_kv: bool = False


def _machine(
    name: str, devices: int, vram: str, ram: str, tflops: float, h2d: float, disk: float
) -> MachineRates:
    device = "cpu" if name == "cpu" else "cuda"
    return MachineRates(
        name, device, devices, parse_size(vram), parse_size(ram), tflops * 1e12, h2d * 1e9,
        disk * 1e9, repeats_kv=name.startswith(("t4", "cpu")),
    )  # fmt: skip


# vram is what a program may take: the card's memory less the CUDA context and 0.7 GiB.
MACHINES = {
    machine.name: machine
    for machine in (
        _machine("t4", 1, "13.9GiB", "27GiB", 30, 10, 0.5),
        _machine("t4x2", 2, "13.9GiB", "27GiB", 30, 10, 0.5),
        _machine("rtx4090", 1, "22.8GiB", "60GiB", 150, 25, 3),
        _machine("a100-40", 1, "38.5GiB", "80GiB", 230, 24, 2),
        _machine("a100-80", 1, "78GiB", "160GiB", 230, 24, 2),
        _machine("h200", 1, "138GiB", "128GiB", 700, 55, 3),
        _machine("cpu", 1, "8GiB", "13GiB", 0.08, 10, 1),
    )
}


def planned_seconds(
    plan: Plan, device: str, gemm_flops: float, h2d: float | None, disk: float | None = None
) -> float:
    """Seconds of a plan's sweeps."""
    return sum(sweep_seconds(plan, device, gemm_flops, h2d, disk))


def sweep_seconds(
    plan: Plan, device: str, gemm_flops: float, h2d: float | None, disk: float | None = None
) -> list[float]:
    """Seconds of each sweep: computing, copying and reading overlap, the longest counts.

    Rates in FLOP/s and bytes/s; None where one is not known and not counted.
    """
    rate = gemm_flops * SWEEP_EFFICIENCY[device]
    return [
        max(flops / rate, copied / h2d if h2d else 0.0, read / disk if disk else 0.0)
        for flops, copied, read in zip(plan.sweep_flops, plan.copies, plan.reads, strict=True)
    ]
