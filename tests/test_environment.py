"""Memory, budgets and versions, on machines written into a temporary folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layersweep.environment import (
    DEVICE_RESERVE,
    GIB,
    HOST_RESERVE,
    Budget,
    DeviceMemory,
    HostMemory,
    device_facts,
    driver_version,
    host_memory,
    package_version,
    ram_budget,
    versions,
    vram_budget,
)
from layersweep.errors import BudgetError, InputError

V1_UNLIMITED = 9223372036854771712


def write(root: Path, path: str, text: str | int) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n", encoding="utf-8")


def machine(root: Path, *, cgroup: str = "0::/job/step", total: int = 64, free: int = 40) -> Path:
    """A root folder with /proc of a machine of `total` GiB, `free` GiB of them available."""
    kib = GIB // 1024
    write(root, "proc/meminfo", f"MemTotal: {total * kib} kB\nMemAvailable:   {free * kib} kB")
    write(root, "proc/self/cgroup", cgroup)
    return root


def test_without_a_limit_available_is_memavailable(tmp_path: Path) -> None:
    root = machine(tmp_path)
    write(root, "sys/fs/cgroup/job/step/memory.max", "max")
    write(root, "sys/fs/cgroup/job/step/memory.current", 30 * GIB)
    assert host_memory(root) == HostMemory(64 * GIB, 40 * GIB, None, "MemAvailable")


def test_cgroup_v2_counts_what_it_holds_but_not_its_page_cache(tmp_path: Path) -> None:
    root = machine(tmp_path)
    write(root, "sys/fs/cgroup/job/step/memory.max", 30 * GIB)
    write(root, "sys/fs/cgroup/job/step/memory.current", 28 * GIB)
    stat = f"anon {3 * GIB}\ninactive_file {20 * GIB}\nactive_file {5 * GIB}"
    write(root, "sys/fs/cgroup/job/step/memory.stat", stat)
    memory = host_memory(root)
    assert (memory.available, memory.cgroup_limit) == (27 * GIB, 30 * GIB)
    assert "cgroup v2 limit 30.00 GiB" in memory.source


def test_the_limit_of_an_enclosing_group_counts(tmp_path: Path) -> None:
    root = machine(tmp_path)
    for folder, limit, used in (("job/step", 30, 1), ("job", 8, 6)):
        write(root, f"sys/fs/cgroup/{folder}/memory.max", limit * GIB)
        write(root, f"sys/fs/cgroup/{folder}/memory.current", used * GIB)
    assert host_memory(root).available == 2 * GIB
    assert host_memory(root).cgroup_limit == 8 * GIB


def test_cgroup_v1_in_a_container_whose_path_is_the_hosts(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", 12 * GIB)
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", 10 * GIB)
    stat = f"inactive_file 1\ntotal_inactive_file {4 * GIB}\ntotal_active_file {GIB}"
    write(root, "sys/fs/cgroup/memory/memory.stat", stat)
    assert host_memory(root).available == 7 * GIB
    assert "cgroup v1 limit 12.00 GiB" in host_memory(root).source


def test_cgroup_v1_without_a_limit_is_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="4:memory:/")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", V1_UNLIMITED)
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", 10 * GIB)
    assert host_memory(root) == HostMemory(64 * GIB, 40 * GIB, None, "MemAvailable")


def test_a_group_above_its_limit_has_nothing_left_rather_than_less(tmp_path: Path) -> None:
    root = machine(tmp_path)
    write(root, "sys/fs/cgroup/job/step/memory.max", 2 * GIB)
    write(root, "sys/fs/cgroup/job/step/memory.current", 3 * GIB)
    assert host_memory(root).available == 0


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert 0 < memory.available <= memory.total


def test_ram_auto_keeps_three_gib_free() -> None:
    memory = HostMemory(24 * GIB, 17 * GIB, None, "MemAvailable")
    budget = ram_budget("auto", memory)
    assert budget.bytes == 14 * GIB
    assert budget.source == "MemAvailable, 17.00 GiB less 3.00 GiB"


def test_vram_auto_keeps_seven_tenths_free() -> None:
    memory = DeviceMemory(total=16 * GIB, free=15 * GIB)
    budget = vram_budget("auto", "cuda", memory=memory)
    assert budget.bytes == 15 * GIB - int(0.7 * GIB)
    assert budget.source.startswith("free memory of cuda")


def test_vram_on_the_cpu_is_half_of_the_host_budget() -> None:
    budget = vram_budget("auto", "cpu", host=Budget(10 * GIB, "--ram"))
    assert (budget.bytes, "half of the host budget" in budget.source) == (5 * GIB, True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stated_size_is_taken_and_named_after_its_flag(device: str) -> None:
    memory = DeviceMemory(16 * GIB, 15 * GIB)
    assert vram_budget("14GiB", device, memory=memory) == Budget(14 * GIB, "--vram")


def test_a_stated_size_beyond_the_machine_is_refused_with_both_numbers() -> None:
    with pytest.raises(BudgetError, match=r"needed 64.00 GiB, available 24.00 GiB") as refusal:
        ram_budget("64GiB", HostMemory(24 * GIB, 17 * GIB, None, "MemAvailable"))
    assert refusal.value.hint == "--ram auto takes what is free"
    with pytest.raises(BudgetError, match=r"needed 16.00 GiB, available 8.00 GiB"):
        ram_budget("16GiB", HostMemory(24 * GIB, 7 * GIB, 8 * GIB, "cgroup v2 limit"))
    with pytest.raises(BudgetError, match=r"needed 16.00 GiB, available 15.00 GiB"):
        vram_budget("16GiB", "cuda", memory=DeviceMemory(16 * GIB, 15 * GIB))


def test_nothing_left_is_a_budget_error() -> None:
    with pytest.raises(BudgetError, match=r"available 2.00 GiB .* more than the 3.00 GiB"):
        ram_budget("auto", HostMemory(4 * GIB, 2 * GIB, None, "MemAvailable"))
    with pytest.raises(BudgetError, match="found 0 bytes"):
        vram_budget("0GiB", "cpu")


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "14 GiB please", "nan"])
def test_an_unparsable_size_names_its_flag(text: str) -> None:
    with pytest.raises(InputError, match="--ram: found"):
        ram_budget(text)
    with pytest.raises(InputError, match="--vram: found"):
        vram_budget(text, "cpu")


@given(st.integers(0, 256 * GIB), st.integers(0, 256 * GIB))
def test_an_automatic_budget_never_exceeds_what_is_there(host: int, device: int) -> None:
    if host > HOST_RESERVE:
        memory = HostMemory(256 * GIB, host, None, "MemAvailable")
        assert 0 < ram_budget("auto", memory).bytes == host - HOST_RESERVE
    if device > DEVICE_RESERVE:
        free = DeviceMemory(256 * GIB, device)
        assert 0 < vram_budget("auto", "cuda", memory=free).bytes == device - DEVICE_RESERVE


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15", "535.104.05"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("NVIDIA UNIX x86_64 Kernel Module  580.65  Mon", "580.65"),
    ],
)
def test_driver_version_of_both_kernel_modules(tmp_path: Path, line: str, version: str) -> None:
    write(tmp_path, "proc/driver/nvidia/version", f"NVRM version: {line}\nGCC version: gcc 12.3.0")
    assert driver_version(tmp_path) == version


def test_no_driver_file_is_no_driver(tmp_path: Path) -> None:
    assert driver_version(tmp_path) is None


def test_versions_name_everything_that_can_change_a_number() -> None:
    found = versions()
    assert list(found) == [
        *("layersweep", "git", "python", "torch", "cuda", "driver"),
        *("transformers", "tokenizers", "bitsandbytes", "triton", "scipy"),
    ]
    import torch

    assert found["torch"] == torch.__version__
    assert found["cuda"] == torch.version.cuda
    assert package_version("no-such-package-is-installed") is None


def test_versions_do_not_import_torch() -> None:
    code = "import sys; from layersweep.environment import versions; versions()"
    code += "; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_cpu_facts_and_a_device_that_is_not_there() -> None:
    facts = device_facts("cpu")
    assert facts["type"] == "cpu"
    assert facts["cores"] >= 1
    assert facts["total_bytes"] == host_memory().total
    with pytest.raises(InputError, match="device 'cuda:99': torch sees"):
        device_facts("cuda:99")
