"""Faults from outside, injected for real: memory that ends, disks that are full, files that change.

Each is met by a clear error or by going on with less; what was finished is never lost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import torch
from test_resume import BUDGET, evaluate, numbers

from layersweep.checkpoint.synth import write_synthetic
from layersweep.cli.app import run
from layersweep.study import run as running
from layersweep.study.shrink import out_of_memory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    assert evaluate(folder, "--vram", "2GiB") == 0
    return folder


def in_sweep(
    number: int, monkeypatch: pytest.MonkeyPatch, fault: Any, *, ever_after: bool = False
) -> None:
    """`fault()` happens in the middle of sweep `number`, and of those behind it."""
    real, sweeps = running.run_sweep, 0

    def sweep(*args: Any, **named: Any) -> Any:
        nonlocal sweeps
        progress, mine = named["progress"], sweeps == number or (ever_after and sweeps > number)
        sweeps += 1

        def tell(phase: str, done: int, total: int) -> None:
            progress(phase, done, total)
            if mine and done == tiny_study.MIDDLE:
                fault()

        return real(*args, **named | {"progress": tell})

    monkeypatch.setattr(running, "run_sweep", sweep)


# --- memory --------------------------------------------------------------------------------------


def refuse_memory() -> None:
    """An allocator that has nothing left, as torch says it on the CPU."""
    torch.empty(2**62, dtype=torch.uint8)


def test_the_words_of_failed_allocations() -> None:
    with pytest.raises(RuntimeError) as failure:
        refuse_memory()
    assert out_of_memory(failure.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError()) and out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not out_of_memory(RuntimeError("shape mismatch")) and not out_of_memory(OSError(28, ""))


def test_memory_that_ends_halves_the_tiles_of_a_sweep(
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_sweep(0, monkeypatch, refuse_memory)
    assert evaluate(tmp_path / "run", "--vram", "2GiB") == 0
    assert "fallback: host memory: wanted" in capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    told = [one for one in results["fallbacks"] if one["what"] == "host memory"]
    assert len(told) == 1 and told[0]["wanted"].endswith("in 1 sweep(s)")
    assert told[0]["used"].endswith("in 2 more")
    assert results["performance"]["sweeps"] == 2
    wanted = numbers(undisturbed) | {"fallbacks": results["fallbacks"]}
    assert numbers(tmp_path / "run") == wanted


def test_memory_that_ends_for_one_tile_too_is_an_error_and_loses_nothing(
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        in_sweep(1, patch, refuse_memory, ever_after=True)
        assert evaluate(tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "error: the host ran out of memory" in said and "Traceback" not in said
    assert "--resume continues after them" in said
    assert evaluate(tmp_path / "run", "--resume") == 0
    assert numbers(tmp_path / "run") == numbers(undisturbed)


LIMITED = """
    import json, resource, sys
    from layersweep.cli.app import run
    from layersweep.study import run as running

    real = running.run_sweep

    def sweep(*args, **named):
        pages = int(open("/proc/self/statm").read().split()[0])
        now = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra, resource.RLIM_INFINITY))
        try:
            return real(*args, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    running.run_sweep = sweep
    for extra, words in json.loads(sys.argv[1]):
        print("exit code", run(words), file=sys.stderr)
"""


def limited(*runs: tuple[int, list[str]]) -> list[str]:
    """What evaluations say that get so many bytes of address space more while they sweep, one
    after the other in one process."""
    done = subprocess.run(
        # small stacks, one heap: address space then is memory, and not what threads set aside
        ["bash", "-c", 'ulimit -s 1024; exec "$@"', "-", sys.executable, "-c",
         textwrap.dedent(LIMITED), json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return re.split(r"(?<=exit code \d\n)", done.stderr)[: len(runs)]


def test_no_address_space_and_that_for_fewer_tiles_than_planned(tmp_path: Path) -> None:
    """Hidden states of 4 KiB a row in a model that computes little: two tiles take about 110 MiB,
    one 55."""
    wide = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1}
    write_synthetic(tmp_path / "model", tiny_study.TINY.with_fields(wide))

    def words(out: str) -> list[str]:
        given = ("--tasks", "ppl", "--kv", "fp8", "--vram", "2GiB", "--out", str(tmp_path / out))
        return tiny_study.words(*given, model=tmp_path / "model")

    assert run(words("whole")) == 0
    nothing, less = limited((0, words("none")), (80 * 2**20, words("less")))
    assert nothing.endswith("exit code 1\n") and "error: the host ran out of memory" in nothing
    assert less.endswith("exit code 0\n"), less
    found, wanted = numbers(tmp_path / "less"), numbers(tmp_path / "whole")
    # once, or where that was not enough once more
    assert {one["what"] for one in found.pop("fallbacks")} == {"host memory"}
    assert wanted.pop("fallbacks") == [] and found == wanted


# --- disks ---------------------------------------------------------------------------------------


def test_a_disk_that_is_full(undisturbed: Path, tmp_path: Path) -> None:
    """A real one, of 64 KiB: the run ends with its name and its reason, and what it left goes on
    where there is room."""
    script = """
        set -e
        mount -t tmpfs -o size=64k tmpfs "$1"
        python=$2; shift 2
        set +e
        "$python" -m layersweep "$@"; code=$?
        ls "${@: -1}/sweeps"
        cp -r "${@: -1}" "$(dirname "$(dirname "${@: -1}")")/copy"
        exit $code
    """
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / "run"
    spaces = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*spaces, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, which a small disk needs")
    done = subprocess.run(
        [*spaces, "bash", "-c", textwrap.dedent(script), "-", str(out.parent), sys.executable,
         *tiny_study.words(*BUDGET, "--out", str(out))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "cannot be written (No space left on device)" in done.stderr
    assert "make room, then go on with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert evaluate(tmp_path / "copy", "--resume") == 0
    assert numbers(tmp_path / "copy") == numbers(undisturbed)


def test_a_folder_that_may_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert evaluate(tmp_path / "file" / "run") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_study.model_folder(), tmp_path / "model")


def evaluate_copy(model: Path, folder: Path, *more: str) -> int:
    return run(tiny_study.words(*BUDGET, "--out", str(folder), *more, model=model))


def test_a_file_that_vanishes_before_it_is_read(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = running.StudyRun.__enter__

    def enter(self: running.StudyRun) -> running.StudyRun:
        next(model.glob("*.safetensors")).unlink()
        return real(self)

    monkeypatch.setattr(running.StudyRun, "__enter__", enter)
    assert evaluate_copy(model, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "found no file that can be opened any more (No such file or directory)" in said
    assert ".safetensors" in said and "Traceback" not in said


@pytest.mark.parametrize("change", ["written to", "cut short"])
def test_a_file_that_changes_while_it_is_read(
    model: Path,
    tmp_path: Path,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = next(model.glob("*.safetensors"))

    def fault() -> None:
        if change == "cut short":
            os.truncate(file, file.stat().st_size // 2)
            return
        with file.open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(b"x")

    in_sweep(1, monkeypatch, fault)
    assert evaluate_copy(model, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert file.name in said and "Traceback" not in said
    assert "changed while it was read" in said or "ends after" in said
    assert len(list((tmp_path / "run" / "sweeps").iterdir())) == 1  # not the one that read it


def test_a_file_that_is_replaced_is_read_to_its_old_end(
    model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a download does it: a new file under the old name. The old one is still open."""
    file = next(model.glob("*.safetensors"))

    def fault() -> None:
        (model / "new").write_bytes(b"something else")
        (model / "new").replace(file)

    in_sweep(0, monkeypatch, fault)
    assert evaluate_copy(model, tmp_path / "run") == 0
    found, wanted = (numbers(f)["perplexity"] for f in (tmp_path / "run", undisturbed))
    assert found["segments"] == wanted["segments"]
