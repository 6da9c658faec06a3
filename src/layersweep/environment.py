"""What this machine is: versions, device, memory, and the budgets that follow from them.

Only facts: nothing is timed here (`layersweep.probes` measures rates). torch is imported only
by the functions that ask a CUDA device, so that reading versions costs nothing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import psutil

import layersweep
from layersweep.errors import BudgetError, InputError
from layersweep.units import format_bytes, parse_size

GIB = 2**30
HOST_RESERVE = 3 * GIB  # left to the system, the interpreter and the page cache being read
DEVICE_RESERVE = int(0.7 * GIB)  # the CUDA context, cuBLAS workspaces and other users of the card
ROOT = Path("/")

_PACKAGES = ("torch", "transformers", "tokenizers", "bitsandbytes", "triton", "scipy")
_DRIVER_VERSION = re.compile(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s")


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory. `available`: what may still be taken, `source` says why;
    `cgroup_limit`: the tightest of this process's control groups, None without one."""

    total: int
    available: int
    cgroup_limit: int | None
    source: str


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one CUDA device. `free` includes what torch's allocator holds in this process."""

    total: int
    free: int


@dataclass(frozen=True)
class Budget:
    """A hard limit in bytes, and where it comes from, in words that are printed."""

    bytes: int
    source: str

    def share(self, processes: int) -> Budget:
        """What is left to one of several processes."""
        if processes == 1:
            return self
        return Budget(self.bytes // processes, f"a share of {processes} of {self.source}")


@functools.cache
def versions() -> Mapping[str, str | None]:
    """Of everything that can change a number, None if absent. Asked once: it starts programs."""
    found: dict[str, str | None] = {
        "layersweep": layersweep.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "cuda": torch_cuda_version(),
        "driver": driver_version(),
    }
    found.update({package: package_version(package) for package in _PACKAGES})
    order = ("layersweep", "git", "python", "torch", "cuda", "driver", *_PACKAGES[1:])
    return MappingProxyType({name: found[name] for name in order})


def package_version(package: str) -> str | None:
    """The installed version by its metadata; the package itself is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_cuda_version() -> str | None:
    """The CUDA that torch was built for, read from torch/version.py; None for a CPU build."""
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is None or torch_spec.origin is None:
        return None
    source = Path(torch_spec.origin).with_name("version.py")
    if not source.is_file():
        return None
    match = re.search(r"^cuda\b[^=]*=\s*'([0-9.]+)'", source.read_text("utf-8"), re.MULTILINE)
    return match[1] if match else None


def driver_version(root: Path = ROOT) -> str | None:
    """The NVIDIA driver's version, None where no driver is loaded."""
    stated = _read(root / "proc/driver/nvidia/version")
    if stated and (match := _DRIVER_VERSION.search(stated)):
        return match[1]
    if root != ROOT:
        return None
    # WSL and some containers have the tool but not the file.
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from ("-dirty" when changed), else None.

    An installed copy that happens to lie inside somebody's repository is not that repository.
    """
    package = Path(layersweep.__file__).resolve().parent
    top = _output("git", "-C", str(package), "rev-parse", "--show-toplevel")
    if not top or Path(top) / "src/layersweep" != package:
        return None
    commit = _output("git", "-C", top, "rev-parse", "HEAD")
    changed = _output("git", "-C", top, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _output(*command: str) -> str | None:
    """Stripped stdout of a short command, None when it is absent, hangs or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except OSError:
        return None


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system states it."""
    stated = _read(ROOT / "proc/cpuinfo") or ""
    match = re.search(r"^model name\s*:\s*(.+)$", stated, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def device_facts(device: str) -> dict[str, Any]:
    """Name, capability and memory of "cpu" or "cuda[:i]", as results.json records them.

    Raises InputError when `device` is CUDA and torch sees none.
    """
    if device == "cpu":
        return {
            "type": "cpu",
            "name": cpu_name(),
            "capability": None,
            "cores": usable_cores(),
            "total_bytes": host_memory().total,
        }
    index = _cuda_index(device)
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "total_bytes": device_memory(device).total,
    }


def device_memory(device: str) -> DeviceMemory:
    """Total and free bytes of a CUDA device; raises InputError when there is none."""
    index = _cuda_index(device)
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return DeviceMemory(total=total, free=free + torch.cuda.memory_reserved(index))


def context_bytes(device: str) -> int:
    """What CUDA holds of a device besides tensors, at most 0.7 GiB: other processes' memory
    looks the same from here, and is not part of anybody's budget."""
    index = _cuda_index(device)
    import torch

    torch.zeros(1, device=device)  # the context may not exist yet
    free, total = torch.cuda.mem_get_info(index)
    return min(total - free - torch.cuda.memory_reserved(index), DEVICE_RESERVE)


def _cuda_index(device: str) -> int:
    import torch

    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(match[1] or 0) if match else -1
    if not 0 <= index < count:
        seen = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise InputError(
            f"device '{device}': torch sees {seen}",
            hint="--device cpu, or run `layersweep doctor` to see what is missing",
        )
    return index


def host_memory(root: Path = ROOT) -> HostMemory:
    """min(MemAvailable, room left by every enclosing control group), from /proc and /sys.

    Page cache charged to a group is not counted as used: the kernel gives it back before it
    refuses memory, and reading a checkpoint once would otherwise use the budget up.
    """
    stated = _read(root / "proc/meminfo")
    if stated is None:  # not Linux
        memory = psutil.virtual_memory()
        return HostMemory(memory.total, memory.available, None, "available memory")
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", stated, re.MULTILINE))
    total, available = int(kib["MemTotal"]) * 1024, int(kib["MemAvailable"]) * 1024
    groups = [group for group in _memory_groups(root) if group.limit < total]
    limit = min((group.limit for group in groups), default=None)
    tightest = min(groups, key=lambda group: group.room, default=None)
    if tightest is not None and tightest.room < available:
        source = f"{tightest.name} limit {format_bytes(tightest.limit)} less what it holds"
        return HostMemory(total, max(tightest.room, 0), limit, source)
    return HostMemory(total, available, limit, "MemAvailable")


@dataclass(frozen=True)
class _MemoryGroup:
    name: str
    limit: int
    room: int


def _memory_groups(root: Path) -> Iterator[_MemoryGroup]:
    """This process's control groups with a memory limit, innermost first, versions 1 and 2."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits_above(
                "cgroup v2",
                (root / "sys/fs/cgroup", path),
                ("memory.max", "memory.current"),
                ("inactive_file", "active_file"),
            )
        elif "memory" in controllers.split(","):
            yield from _limits_above(
                "cgroup v1",
                (root / "sys/fs/cgroup/memory", path),
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
                ("total_inactive_file", "total_active_file"),
            )


def _limits_above(
    name: str, place: tuple[Path, str], files: tuple[str, str], cache_fields: tuple[str, str]
) -> Iterator[_MemoryGroup]:
    """Groups from `place` up to the mount. In a container the path may exist only on the host;
    the walk then starts at the nearest folder that is there, at the latest the mount itself."""
    mount, path = place
    inside = PurePosixPath(path.lstrip("/"))
    for relative in (inside, *inside.parents):
        folder = mount / relative
        limit_text, usage_text = (_read(folder / file) for file in files)
        if limit_text is None or usage_text is None or limit_text.strip() == "max":
            continue
        held = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat") or "", re.M))
        cache = sum(int(held.get(field, 0)) for field in cache_fields)
        limit = int(limit_text)
        yield _MemoryGroup(name, limit, limit - max(int(usage_text) - cache, 0))


def ram_budget(text: str, memory: HostMemory | None = None) -> Budget:
    """The host budget of `--ram`: a size, or "auto": what is available less 3 GiB.

    Raises InputError for an unparsable size, BudgetError when it is not above zero or above
    what the machine or its control group can ever give.
    """
    memory = memory or host_memory()
    if text != "auto":
        ceiling = min(memory.total, memory.cgroup_limit or memory.total)
        return _stated_budget(text, "--ram", ceiling, "the memory of this machine")
    return _auto_budget("--ram", memory.available, HOST_RESERVE, memory.source)


def vram_budget(
    text: str,
    device: str,
    *,
    host: Budget | None = None,
    memory: DeviceMemory | None = None,
) -> Budget:
    """The device budget of `--vram`: a size, or "auto": free device memory less 0.7 GiB.

    On the CPU it bounds the compute working set: "auto" is half of the host budget `host`.
    Raises InputError for an unparsable size, BudgetError when it is not above zero or above
    the free memory of the device.
    """
    if device == "cpu":
        if text != "auto":
            return _stated_budget(text, "--vram", None, "")
        host = host or ram_budget("auto")
        return Budget(host.bytes // 2, f"CPU working set: half of the host budget ({host.source})")
    memory = memory or device_memory(device)
    if text != "auto":
        return _stated_budget(text, "--vram", memory.free, f"free memory of {device}")
    return _auto_budget("--vram", memory.free, DEVICE_RESERVE, f"free memory of {device}")


def _auto_budget(option: str, available: int, reserve: int, source: str) -> Budget:
    if available <= reserve:
        raise BudgetError(
            f"{option} auto: available {format_bytes(available)} ({source}), "
            f"needed more than the {format_bytes(reserve)} that is kept free",
            hint=f"free some memory, or give a size that fits, for example {option} 1GiB",
        )
    words = f"{source}, {format_bytes(available)} less {format_bytes(reserve)}"
    return Budget(available - reserve, words)


def _stated_budget(text: str, option: str, ceiling: int | None, ceiling_name: str) -> Budget:
    size = parse_size(text, option=option)
    if size <= 0:
        raise BudgetError(
            f"{option} {text}: found 0 bytes, needed more than 0",
            hint=f"{option} auto takes what is free",
        )
    if ceiling is not None and size > ceiling:
        raise BudgetError(
            f"{option} {text}: needed {format_bytes(size)}, available {format_bytes(ceiling)} "
            f"({ceiling_name})",
            hint=f"{option} auto takes what is free",
        )
    return Budget(size, option)
