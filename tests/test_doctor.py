"""`layersweep doctor`: its probes on this machine, its findings on machines that are described."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from layersweep.cli.doctor import demo_gemm_shape, doctor, findings
from layersweep.environment import GIB
from layersweep.errors import InputError
from layersweep.probes import cpu_gemm_rate, disk_read_rate, memory_copy_rate

MIB = 2**20

CPU_MACHINE: dict[str, Any] = {
    "versions": {"torch": "2.13.0", "cuda": "13.0", "driver": None},
    "torch_warnings": [],
    "devices": [],
    "host": {"total": 64 * GIB, "available": 60 * GIB, "cgroup_limit": None, "source": "x"},
    "budgets": {"ram": {"bytes": 57 * GIB, "source": "x"}, "vram": {"bytes": 28 * GIB}},
    "disk": {"folder": "here", "bytes_per_s": 1e9, "resident": 0.0},
}


def t4_machine() -> dict[str, Any]:
    facts = copy.deepcopy(CPU_MACHINE)
    facts["versions"]["driver"] = "550.54.15"
    facts["devices"] = [{"name": "Tesla T4", "capability": "7.5"}]
    facts["kernels"] = {"attention_flash": False, "attention_memory_efficient": True}
    facts["kernel_error"] = None
    facts["pin_limit"] = {"bytes": 8 * GIB, "error": None}
    return facts


def texts(facts: dict[str, Any], level: str) -> list[str]:
    return [finding.text for finding in findings(facts) if finding.level == level]


def test_a_machine_without_a_driver_runs_on_the_cpu() -> None:
    (note,) = texts(CPU_MACHINE, "note")
    assert note.startswith("no NVIDIA driver found: runs on the CPU in float32")
    assert texts(CPU_MACHINE, "problem") == []


def test_a_driver_with_a_cpu_build_of_torch_is_a_problem() -> None:
    facts = copy.deepcopy(CPU_MACHINE)
    facts["versions"] |= {"driver": "550.54.15", "cuda": None, "torch": "2.13.0+cpu"}
    (problem,) = texts(facts, "problem")
    assert "driver 550.54.15 is there, but torch 2.13.0+cpu is a CPU build" in problem


def test_a_driver_that_torch_cannot_use_repeats_what_torch_said() -> None:
    facts = copy.deepcopy(CPU_MACHINE)
    facts["versions"]["driver"] = "470.1"
    facts["torch_warnings"] = ["The NVIDIA driver on your system is too old"]
    (problem,) = texts(facts, "problem")
    assert "sees no device" in problem
    assert "The NVIDIA driver on your system is too old" in problem


def test_a_t4_has_a_note_and_no_problem() -> None:
    facts = t4_machine()
    assert texts(facts, "problem") == []
    (note,) = texts(facts, "note")
    assert note.startswith("Tesla T4: no bfloat16 and no flash attention below sm_80")


def test_what_breaks_a_t4_is_a_problem_each() -> None:
    facts = t4_machine()
    facts["kernels"]["attention_memory_efficient"] = False
    facts["pin_limit"] = {"bytes": 2 * GIB, "error": "cudaHostRegister failed with CUDA error 2"}
    kernels, pins = texts(facts, "problem")
    assert kernels.startswith("no fused attention kernel")
    assert pins == (
        "only 2.00 GiB of host memory can be pinned: cudaHostRegister failed with CUDA error 2"
    )


def test_an_old_card_is_a_problem() -> None:
    facts = t4_machine()
    facts["devices"] = [{"name": "Tesla P100", "capability": "6.0"}]
    (problem,) = texts(facts, "problem")
    assert problem == "Tesla P100: found sm_60, needed sm_75 or newer for the kernels"


def test_kernels_that_cannot_be_compiled_are_a_problem() -> None:
    facts = t4_machine()
    facts["kernel_error"] = "no libnvrtc.so.12"
    (problem,) = texts(facts, "problem")
    assert "no libnvrtc.so.12" in problem and "plain torch is used" in problem


def test_memory_findings_state_sizes() -> None:
    facts = copy.deepcopy(CPU_MACHINE)
    facts["budgets"]["ram"]["bytes"] = 10 * GIB
    facts["host"]["cgroup_limit"] = 13 * GIB
    notes = texts(facts, "note")
    assert "host budget 10.00 GiB: Mixtral-8x7B in NF4 (22.80 GiB) would stream from disk" in notes
    assert "this process may hold 13.00 GiB (control group), the machine has 64.00 GiB" in notes
    facts["budgets"] = {"refused": "--ram auto: available 2.00 GiB"}
    assert texts(facts, "problem") == ["--ram auto: available 2.00 GiB"]


def test_a_disk_rate_from_memory_is_not_passed_off_as_a_disks() -> None:
    facts = copy.deepcopy(CPU_MACHINE)
    facts["disk"]["resident"] = 1.0
    assert any("100% of the file stayed in memory" in note for note in texts(facts, "note"))
    facts["disk"] = {"folder": "here", "bytes_per_s": None, "error": "read-only"}
    assert "disk rate of here not measured: read-only" in texts(facts, "note")


def test_disk_probe_reads_every_byte_and_leaves_nothing(tmp_path: Path) -> None:
    rate = disk_read_rate(tmp_path, size=64 * MIB)
    assert rate.bytes_read == 64 * MIB
    assert rate.bytes_per_s > 0
    assert 0.0 <= rate.resident <= 1.0
    assert list(tmp_path.iterdir()) == []


def test_disk_probe_refuses_a_disk_that_it_would_fill(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"free, .* needed"):
        disk_read_rate(tmp_path, size=2**60)


def test_cpu_rates_are_plausible() -> None:
    assert 1e8 < memory_copy_rate(32 * MIB) < 1e12
    assert 1e8 < cpu_gemm_rate((512, 512, 512)) < 1e14


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")
def test_json_is_all_that_stdout_holds(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(doctor)
    done = CliRunner().invoke(app, ["--json", "--disk", str(tmp_path)])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["devices"] == []
    assert report["disk"]["bytes_read"] == 256 * MIB
    assert report["rates"]["cpu_gemm"][0]["shape"] == [2048, 2048, 2048]
    assert "driver" in report["findings"][0]["text"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_no_folder_is_named(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(doctor)
    done = CliRunner().invoke(app, ["--disk", str(tmp_path / "nowhere")])
    assert isinstance(done.exception, InputError)
    assert "nowhere: found no folder" in str(done.exception)


def test_demo_shape_is_one_expert_of_the_bundled_model() -> None:
    assert demo_gemm_shape() == (12_800, 256, 384)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_probes_give_everything_back() -> None:
    from layersweep.probes import attention_kernels, bus_rates, pin_limit

    rates = bus_rates("cuda:0")
    assert rates.pinned_h2d >= 0.9 * rates.pageable_h2d
    assert any(attention_kernels("cuda:0").values())
    assert pin_limit("cuda:0", 5 * GIB).bytes <= 2 * GIB
    assert torch.ones(2, device="cuda:0").sum().item() == 2.0  # no error was left behind
