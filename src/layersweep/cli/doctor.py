"""`layersweep doctor`: what this machine has, how fast it is, and what that means for a run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layersweep.environment import (
    GIB,
    device_facts,
    device_memory,
    host_memory,
    ram_budget,
    versions,
    vram_budget,
)
from layersweep.errors import BudgetError, InputError
from layersweep.units import format_bytes

MIXTRAL_NF4_BYTES = 24_483_151_552  # Mixtral-8x7B, double quant, packed router
CUDA_GEMM_MEMORY = 2 * GIB  # the ceiling's operands and result take 1.1 GB
OLDEST_CAPABILITY = 7.5  # the oldest that current CUDA builds of torch serve


@dataclass(frozen=True)
class Finding:
    """One sentence about this machine. level: "ok", "note" (works, with a limit) or "problem"."""

    level: str
    text: str


def doctor(
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    disk: Annotated[
        Path,
        typer.Option(
            help="Folder on the disk to measure, for example the checkpoint's. A temporary file of "
            "256 MiB is written there and removed."
        ),
    ] = Path(),
) -> None:
    """Check this machine: versions, device, memory budgets and measured rates."""
    if not disk.is_dir():
        raise InputError(
            f"--disk {disk}: found no folder, needed one", hint="name a folder that exists"
        )
    progress = Console(stderr=True)
    progress.print("measuring disk, memory and compute, up to half a minute", style="dim")
    facts = collect(disk)
    found = findings(facts)
    if json_output:
        typer.echo(json.dumps({**facts, "findings": [asdict(one) for one in found]}, indent=2))
        return
    _print_report(facts, found, Console())


def collect(disk: Path) -> dict[str, Any]:
    """Every fact and rate as JSON values; rates are bytes or FLOP per second, sizes bytes."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [f"cuda:{index}" for index in range(count)]
    facts: dict[str, Any] = {
        "versions": dict(versions()),
        "torch_warnings": [str(warning.message).strip() for warning in said],
        "cpu": {**device_facts("cpu"), "threads": torch.get_num_threads()},
        "devices": [
            {**device_facts(name), "free_bytes": device_memory(name).free} for name in names
        ],
        "host": asdict(host_memory()),
        "budgets": _budgets(names[0] if names else "cpu"),
        "disk": _disk_facts(disk),
        "rates": _cpu_rates(),
    }
    if names:
        facts["rates"].update(_cuda_rates(names[0], facts["devices"][0]["free_bytes"]))
        facts["kernels"] = _kernels(names[0])
        facts["kernel_error"] = _kernel_error(names[0])
        facts["pin_limit"] = _pin_facts(names[0], facts["host"]["available"])
    return facts


def _budgets(device: str) -> dict[str, Any]:
    """What `--ram auto` and `--vram auto` would be now, or why they are refused."""
    answers: dict[str, Any] = {}
    try:
        host = ram_budget("auto")
        answers["ram"] = asdict(host)
        answers["vram"] = asdict(vram_budget("auto", device, host=host))
    except BudgetError as refusal:
        answers["refused"] = str(refusal)
    return answers


def _disk_facts(folder: Path) -> dict[str, Any]:
    from layersweep.probes import disk_read_rate

    try:
        return {"folder": str(folder.resolve()), **asdict(disk_read_rate(folder))}
    except OSError as refusal:
        return {"folder": str(folder.resolve()), "bytes_per_s": None, "error": str(refusal)}


def demo_gemm_shape() -> tuple[int, int, int] | None:
    """Rows of one expert in a tile, hidden, intermediate size of the bundled model, if it is in."""
    from layersweep.probes import TILE_ROWS

    for config in sorted(Path(str(files("layersweep.demo"))).rglob("config.json")):
        stated = json.loads(config.read_text("utf-8"))
        return TILE_ROWS, stated["hidden_size"], stated["intermediate_size"]
    return None


def _cpu_rates() -> dict[str, Any]:
    from layersweep.probes import cpu_gemm_rate, memory_copy_rate

    shapes = [(2048, 2048, 2048)]
    if demo_shape := demo_gemm_shape():
        shapes.append(demo_shape)
    return {
        "memory_copy": memory_copy_rate(),
        "cpu_gemm": [
            {"shape": list(shape), "dtype": "float32", "flop_per_s": cpu_gemm_rate(shape)}
            for shape in shapes
        ],
    }


def _cuda_rates(device: str, free: int) -> dict[str, Any]:
    from layersweep.probes import TILE_ROWS, bus_rates, cuda_gemm_rate

    rates: dict[str, Any] = asdict(bus_rates(device))
    if free >= CUDA_GEMM_MEMORY:
        shape = (TILE_ROWS, 4096, 28672)  # w1 and w3 of one Mixtral-8x7B expert over one tile
        rate = cuda_gemm_rate(device, shape)
        rates["cuda_gemm"] = {"shape": list(shape), "dtype": "float16", "flop_per_s": rate}
    return rates


def _kernels(device: str) -> dict[str, bool]:
    from layersweep.probes import attention_kernels

    return {f"attention_{name}": runs for name, runs in attention_kernels(device).items()}


def _kernel_error(device: str) -> str | None:
    """Why our kernels cannot be compiled and run here; None where they can."""
    import torch

    from layersweep.kernels import KernelError, load_kernels

    try:
        load_kernels(torch.device(device), torch.float16)
    except KernelError as failure:
        return str(failure).splitlines()[0]
    return None


def _pin_facts(device: str, available: int) -> dict[str, Any]:
    from layersweep.probes import pin_limit

    return asdict(pin_limit(device, available))


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """What the facts mean for a run, most important first. Pure."""
    return [
        *_device_findings(facts),
        *_kernel_findings(facts),
        *_memory_findings(facts),
        *_disk_findings(facts["disk"]),
    ]


def _device_findings(facts: Mapping[str, Any]) -> list[Finding]:
    stated = facts["versions"]
    if facts["devices"]:
        return [finding for device in facts["devices"] for finding in _capability(device)]
    why = [f"torch said: {text}" for text in facts["torch_warnings"]]
    if stated["driver"] is None:
        text = "no NVIDIA driver found: runs on the CPU in float32; fine for the demo, far too "
        return [Finding("note", text + "slow for Mixtral-8x7B")]
    if stated["cuda"] is None:
        text = f"driver {stated['driver']} is there, but torch {stated['torch']} is a CPU build: "
        return [Finding("problem", text + "install a CUDA build of torch to use the GPU")]
    text = f"driver {stated['driver']} and torch for CUDA {stated['cuda']} are there, but torch "
    advice = "sees no device: the driver is too old for that CUDA, or CUDA_VISIBLE_DEVICES hides it"
    return [Finding("problem", "; ".join([text + advice, *why]))]


def _capability(device: Mapping[str, Any]) -> list[Finding]:
    capability, name = float(device["capability"]), device["name"]
    if capability < OLDEST_CAPABILITY:
        text = f"{name}: found sm_{capability * 10:.0f}, needed sm_75 or newer for the kernels"
        return [Finding("problem", text)]
    if capability < 8.0:
        text = f"{name}: no bfloat16 and no flash attention below sm_80; float16 with the "
        return [Finding("note", text + "memory-efficient attention kernel")]
    return [Finding("ok", f"{name}: float16 for eval, flash attention possible")]


def _kernel_findings(facts: Mapping[str, Any]) -> list[Finding]:
    if not facts["devices"]:
        return []
    found = []
    kernels = facts["kernels"]
    if not (kernels["attention_flash"] or kernels["attention_memory_efficient"]):
        text = "no fused attention kernel runs here, and the unfused one is never used on CUDA"
        found.append(Finding("problem", text))
    if facts["kernel_error"]:
        text = (
            f"our kernels cannot be compiled here ({facts['kernel_error']}): plain torch is used, "
        )
        found.append(Finding("problem", text + "several times slower"))
    return found


def _memory_findings(facts: Mapping[str, Any]) -> list[Finding]:
    budgets, host = facts["budgets"], facts["host"]
    if "refused" in budgets:
        return [Finding("problem", budgets["refused"])]
    found = []
    ram = budgets["ram"]["bytes"]
    if ram < MIXTRAL_NF4_BYTES:
        text = f"host budget {format_bytes(ram)}: Mixtral-8x7B in NF4 "
        text += f"({format_bytes(MIXTRAL_NF4_BYTES)}) would stream from disk"
        found.append(Finding("note", text))
    if host["cgroup_limit"] is not None:
        text = f"this process may hold {format_bytes(host['cgroup_limit'])} (control group), the "
        found.append(Finding("note", text + f"machine has {format_bytes(host['total'])}"))
    pins = facts.get("pin_limit")
    if pins and pins["error"]:
        text = f"only {format_bytes(pins['bytes'])} of host memory can be pinned: {pins['error']}"
        found.append(Finding("problem", text))
    return found


def _disk_findings(disk: Mapping[str, Any]) -> list[Finding]:
    if disk["bytes_per_s"] is None:
        return [Finding("note", f"disk rate of {disk['folder']} not measured: {disk['error']}")]
    if disk["resident"] > 0.01:
        text = f"disk rate is not a disk's: {disk['resident']:.0%} of the file stayed in memory "
        return [Finding("note", text + f"({disk['folder']} may be a memory file system)")]
    return []


def _print_report(facts: Mapping[str, Any], found: list[Finding], console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    console.print(table)
    console.print()
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    sentences = Table(show_header=False, box=None, pad_edge=False)
    for finding in found:
        sentences.add_row(Text(finding.level, styles[finding.level]), Text(finding.text))
    console.print(sentences)


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    stated, cpu, host = facts["versions"], facts["cpu"], facts["host"]
    rows = [(name, version or "-") for name, version in stated.items()]
    rows.append(("cpu", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']}"))
    for index, device in enumerate(facts["devices"]):
        sizes = f"{format_bytes(device['free_bytes'])} of {format_bytes(device['total_bytes'])}"
        text = f"{device['name']}, capability {device['capability']}, {sizes} free"
        rows.append((f"cuda:{index}", text))
    available, total = format_bytes(host["available"]), format_bytes(host["total"])
    rows.append(("host memory", f"{available} of {total} available ({host['source']})"))
    for option in ("ram", "vram"):
        if budget := facts["budgets"].get(option):
            rows.append(
                (f"--{option} auto", f"{format_bytes(budget['bytes'])} ({budget['source']})")
            )
    return [*rows, *_rate_rows(facts)]


def _rate_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    disk, rates = facts["disk"], facts["rates"]
    rows = []
    if disk["bytes_per_s"] is not None:
        rows.append(("disk read", f"{_gigabytes(disk['bytes_per_s'])} in {disk['folder']}"))
    rows.append(("memory copy", _gigabytes(rates["memory_copy"])))
    for name in ("pinned_h2d", "pageable_h2d", "pinned_d2h"):
        if name in rates:
            rows.append((name.replace("_", " "), _gigabytes(rates[name])))
    gemms = [*rates["cpu_gemm"], *([rates["cuda_gemm"]] if "cuda_gemm" in rates else [])]
    for gemm in gemms:
        m, k, n = gemm["shape"]
        text = f"{gemm['flop_per_s'] / 1e9:,.0f} GFLOP/s  [{m},{k}]x[{k},{n}]"
        rows.append((f"product {gemm['dtype']}", text))
    for kernel, runs in facts.get("kernels", {}).items():
        rows.append((kernel.replace("_", " "), "runs" if runs else "refused"))
    if pins := facts.get("pin_limit"):
        bound = "" if pins["error"] else "at least "
        rows.append(("pin limit", f"{bound}{format_bytes(pins['bytes'])}"))
    return rows


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"
