"""A run that is interrupted anywhere ends, resumed, with the bits of an undisturbed one."""

from __future__ import annotations

import copy
import itertools
import json
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_study

import layersweep
from layersweep import environment
from layersweep.cli.app import run
from layersweep.errors import InputError
from layersweep.runs.differences import differences
from layersweep.runs.finished import DamagedSweep, sealed, unpack
from layersweep.runs.folder import RunFolder
from layersweep.runs.record import TileKey
from layersweep.stream.plan import Plan
from layersweep.stream.rates import SWEEP_EFFICIENCY
from layersweep.study.manifest import code_sha256
from layersweep.study.sizing import DISK, LOSS_S, REPEATED_SHARE, sized_plan
from layersweep.study.study import prepare_study
from layersweep.tasks.settings import EvalSettings

Json = dict[str, Any]
BUDGET = ("--vram", tiny_study.ONE_TILE)
SWEEPS = tiny_study.TILES  # the budget holds one tile at a time


def evaluate(folder: Path, *more: str) -> int:
    return tiny_study.evaluate(*BUDGET, "--out", str(folder), *more)


# results.json without what tells of the process that computed it
numbers = runpy.run_path(str(Path(__file__).parents[1] / "tools/kill_and_resume.py"))["numbers"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    assert evaluate(folder) == 0
    assert len(list((folder / "sweeps").iterdir())) == SWEEPS
    return folder


def interrupted(folder: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets Ctrl-C in the sweep behind the `after`-th."""
    from layersweep.study import run as running

    real, sweeps = running.run_sweep, 0

    def sweep(*args: Any, **named: Any) -> Any:
        nonlocal sweeps
        if sweeps == after:

            def stop(phase: str, done: int, total: int) -> None:
                if done == tiny_study.MIDDLE:
                    raise KeyboardInterrupt

            named["progress"] = stop
        sweeps += 1
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(running, "run_sweep", sweep)
        assert evaluate(folder) == 130
    assert len(list((folder / "sweeps").iterdir())) == after
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    undisturbed: Path,
    tmp_path: Path,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted(tmp_path / "run", after, monkeypatch)
    assert evaluate(tmp_path / "run", "--resume") == 0
    assert f"after {after} finished sweep(s): {after} of 3 tiles" in capsys.readouterr().err
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    for name in ("segments.jsonl", "needle.jsonl", "windows.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes()
    done = json.loads((tmp_path / "run" / "results.json").read_text())["performance"]
    assert (done["sweeps"], done["resumed_tiles"]) == (SWEEPS - after, after)


def test_a_budget_may_change_on_the_way_and_a_finished_run_reads_nothing(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", 2, monkeypatch)
    assert evaluate(tmp_path / "run", "--resume", "--vram", "2GiB") == 0
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    (tmp_path / "run" / "results.json").unlink()
    assert evaluate(tmp_path / "run", "--resume") == 0
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    done = json.loads((tmp_path / "run" / "results.json").read_text())["performance"]
    assert (done["weight_bytes_read"], done["sweeps"], done["resumed_tiles"]) == (0, 0, 3)


def test_a_damaged_sweep_is_computed_again(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    path = folder / "sweeps" / "0001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert evaluate(folder, "--resume") == 0
    said = capsys.readouterr().err
    assert "0001.safetensors: " in said and "its tiles are computed again" in said
    assert "2 of 3 tiles" in said
    assert numbers(folder) == numbers(undisturbed)


def test_what_is_no_sweep_of_this_study(undisturbed: Path) -> None:
    settings = EvalSettings(
        kv="fp8", tasks=("ppl",), segments=40, prefix=96, continuation=32, gate="off",
        text=str(tiny_study.text_file()),
    )  # fmt: skip
    study = prepare_study(layersweep.load(str(tiny_study.model_folder()), device="cpu"), settings)
    data = (undisturbed / "sweeps" / "0001.safetensors").read_bytes()
    assert unpack(study.record, data).tiles == [TileKey("perplexity", 20, 20)]
    other_tile = sealed(data.replace(b'\\"first\\": 20', b'\\"first\\": 21'))
    other_arm = sealed(data.replace(b"fp8", b"fp9"))
    other_format = sealed(data.replace(b"layersweep.sweep/2", b"layersweep.sweep/3"))
    results = (undisturbed / "results.json").read_bytes()
    for damaged in (
        data[: len(data) // 2],
        b"",
        data + b"0",
        results,
        other_tile,
        other_arm,
        other_format,
    ):
        assert damaged != data
        with pytest.raises(DamagedSweep):
            unpack(study.record, damaged)


def test_generation_is_one_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--niah-mode", "generate", "--tasks", "niah", "--niah-depths", "0.5")
    assert evaluate(tmp_path / "one", *more) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for kept in (tmp_path / "two" / "sweeps").iterdir():
        kept.unlink()
    assert evaluate(tmp_path / "two", *more, "--resume") == 0
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    capsys.readouterr()
    assert evaluate(tmp_path / "two", *more, "--resume") == 0
    assert "1 of 1 tiles" in capsys.readouterr().err
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (("--seed", "1"), "seed 0 there, 1 here"),
        (("--segments", "39"), "segments 40 there, 39 here"),
        (("--kv", "e8:K3V2"), "arms ['fp8"),
        (("--router-dtype", "hidden"), "router-dtype float32 there, hidden here"),
    ],
)
def test_another_run_is_refused_with_what_differs(
    undisturbed: Path, more: tuple[str, ...], differs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(undisturbed.rglob("*"))
    assert evaluate(undisturbed, "--resume", *more) == 2
    said = capsys.readouterr().err
    assert differs in said and said.count("error:") == 1 and "Traceback" not in said
    assert sorted(undisturbed.rglob("*")) == before  # nothing of ours is left in it


def test_another_version_text_or_checkpoint_is_refused(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("torch", "checkpoint fingerprint", "text sha256", "metrics_version", "schema"):
        changed = copy.deepcopy(manifest) | {name: "other"}
        (folder / "manifest.json").write_text(json.dumps(changed))
        assert evaluate(folder, "--resume") == 2
        assert f"{name} other there, " in capsys.readouterr().err
    (folder / "manifest.json").write_text('{"torch": ')
    assert evaluate(folder, "--resume") == 2
    assert "manifest.json: cannot be read" in capsys.readouterr().err


def test_the_code_counts_and_neither_git_nor_a_page_of_docs(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    commit = environment.git_commit()
    assert commit is None or commit not in json.dumps(manifest)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "run.py").write_text("1")
    (tmp_path / "kernels/a.cu").write_text("1")
    (tmp_path / "README.md").write_text("1")
    before = code_sha256(tmp_path)
    (tmp_path / "README.md").write_text("2")
    code_sha256.cache_clear()
    assert code_sha256(tmp_path) == before
    (tmp_path / "kernels/a.cu").write_text("2")
    code_sha256.cache_clear()
    assert code_sha256(tmp_path) != before


def test_values_that_differ_far_behind_are_shown_where_they_do() -> None:
    there = {"arms": [f"trellis:K3V2@sink={n} version 2" for n in (1, 2, 3)], "same": "x" * 99}
    here = there | {"arms": [f"trellis:K3V2@sink={n} version 2" for n in (1, 2, 4)]}
    assert differences(there, here) == [
        "arms ...ion 2', 'trellis:K3V2@sink=3 version 2'] there, "
        "...ion 2', 'trellis:K3V2@sink=4 version 2'] here"
    ]
    long = {"code sha256": "a" * 60 + "bcde"}, {"code sha256": "a" * 60 + "xyde"}
    assert differences(*long) == [f"code sha256 ...{'a' * 36}bcde there, ...{'a' * 36}xyde here"]


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, print):
        for resume in (False, True):
            with pytest.raises(InputError, match="found another run at work there"):
                RunFolder(tmp_path, print, resume=resume)
    RunFolder(tmp_path, print).__exit__()


def test_resume_needs_a_folder_and_starts_in_an_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "demo", "--resume"]) == 2
    assert "--resume: found no --out" in capsys.readouterr().err
    assert evaluate(tmp_path / "new", "--resume", "--gate", "only") == 0
    assert "nothing to resume, a new one starts" in capsys.readouterr().err
    assert evaluate(tmp_path / "new", "--resume", "--gate", "only") == 0
    assert "0 of 0 tiles" in capsys.readouterr().err


# --- kills ---------------------------------------------------------------------------------------


def test_killed_in_the_middle(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL in the second sweep; tools/kill_and_resume.py does it at random moments."""
    folder = tmp_path / "run"
    command = [sys.executable, tiny_study.KILLED, *tiny_study.words(*BUDGET, "--out", str(folder))]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((folder / "sweeps").glob("*.safetensors"))) == 1
    assert not (folder / "results.json").exists()
    assert evaluate(folder, "--resume") == 0
    assert numbers(folder) == numbers(undisturbed)


# --- how many sweeps -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sketch:
    """Of a plan, what sized_plan looks at."""

    sweeps: tuple[tuple[int, ...], ...]
    sweep_flops: tuple[float, ...]
    copies: tuple[int, ...]
    reads: tuple[int, ...]


def sized(tiles: int, seconds: float, disk_s: float) -> Plan:
    """The plan for `tiles` equal tiles that take `seconds` in all, and weights read in `disk_s`."""

    def plan_of(count: int) -> Sketch:
        cuts = [tiles * i // count for i in range(count + 1)]
        sweeps = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(cuts))
        flops = tuple(
            len(sweep) / tiles * seconds * 1e12 * SWEEP_EFFICIENCY["cuda"] for sweep in sweeps
        )
        return Sketch(sweeps, flops, (0,) * count, (int(disk_s * DISK),) * count)

    return sized_plan(plan_of, tiles, "cuda", 1e12)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("tiles", "seconds", "disk_s", "sweeps"),
    [
        (4, 200, 50, 1),  # short enough
        (4, 1000, 50, 4),  # 250 s each, all of them above the time to read
        (8, 1000, 50, 4),
        (8, 4000, 50, 8),  # a tile takes 500 s: no smaller unit
        (8, 2400, 320, 5),  # 8 of 300 s would read for 2560 s in all; 5 take 1.7 % more than one
        (8, 400, 399, 1),  # reading is all there is: a second time would double it
    ],
)
def test_sweeps_lose_five_minutes_or_repeat_three_percent(
    tiles: int, seconds: float, disk_s: float, sweeps: int
) -> None:
    assert (LOSS_S, REPEATED_SHARE) == (300, 0.03)
    assert len(sized(tiles, seconds, disk_s).sweeps) == sweeps
