"""Several processes on one study: whole tiles each, and together the bits of one process."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_study
from hypothesis import given
from hypothesis import strategies as st
from tiny_study import TILES, evaluate

from layersweep.cli.app import run
from layersweep.cli.job import device_of
from layersweep.cli.shards import collect
from layersweep.errors import InputError
from layersweep.runs.shard import WHOLE, Shard, parse_shard, shard_of_rank, share
from layersweep.study.run import TimeLimit
from layersweep.units import parse_duration

# results.json without what tells of the processes that computed it
numbers = runpy.run_path(str(Path(__file__).parents[1] / "tools/kill_and_resume.py"))["numbers"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert evaluate("--out", str(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same study as --shard 1/2 and 2/2, each a run of its own."""
    root = tmp_path_factory.mktemp("two")
    for number in (1, 2):
        assert evaluate("--shard", f"{number}/2", "--out", str(root / f"s{number}")) == 0
    return [root / "s1", root / "s2"]


def same(folder: Path, alone: Path) -> None:
    assert numbers(folder) == numbers(alone)
    for name in ("segments.jsonl", "needle.jsonl", "windows.csv"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()


def test_merged_shards_have_the_bits_of_one_process(
    alone: Path, shards: list[Path], tmp_path: Path
) -> None:
    assert run(["merge", *map(str, reversed(shards)), "--out", str(tmp_path / "both")]) == 0
    same(tmp_path / "both", alone)
    done = json.loads((tmp_path / "both" / "results.json").read_text())["performance"]
    assert [one["shard"] for one in done["shards"]] == ["2/2", "1/2"]
    assert (done["sweeps"], done["gate_sweeps"]) == (2, 0)
    one = json.loads((alone / "results.json").read_text())["performance"]
    assert done["tokens"] == one["tokens"]
    assert done["weight_bytes_read"] == 2 * one["weight_bytes_read"]
    assert evaluate("--resume", "--out", str(tmp_path / "both")) == 0  # as one process's own
    same(tmp_path / "both", alone)


def test_parts_are_put_together_without_torch(
    shards: list[Path], alone: Path, tmp_path: Path
) -> None:
    code = "import sys; from layersweep.cli.app import run; code = run(sys.argv[1:]); "
    code += "assert not {'torch', 'layersweep.model'} & set(sys.modules); sys.exit(code)"
    both = str(tmp_path / "both")
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", *map(str, shards), "--out", both],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(tmp_path / "both", alone)


def test_a_shard_says_what_it_is(shards: list[Path]) -> None:
    first, second = (json.loads((folder / "results.json").read_text()) for folder in shards)
    assert (first["status"], second["status"]) == ("partial", "partial")
    assert first["reasons"][0] == f"2 of {TILES} tiles are done"
    assert second["reasons"][0] == f"1 of {TILES} tiles are done"
    assert first["perplexity"] is second["perplexity"] is None  # one tile of windows each
    assert first["needle"] and second["needle"] is None  # all needles are one tile
    assert first["gate"]["passed"] and second["gate"]["passed"]  # each on a host of its own


@pytest.mark.parametrize(
    ("case", "said"),
    {
        "one is missing": "the first that is missing is perplexity 0 to 19",
        "one is there twice": "s1 twice, needed every folder once",
        "a tile is there twice": "has, too; needed every tile once",
        "another study": "segments 40 there, 20 in",
        "not at its end": "found no results.json",
        "a number that flipped": "the hash that was written with them",
        "another window": "other windows or trials",
        "no facts": "needed the facts of a study",
    }.items(),
)
def test_what_does_not_belong_together_is_refused(
    case: str,
    said: str,
    shards: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (shutil.copytree(folder, tmp_path / folder.name) for folder in shards)
    parts = [first, second]
    if case == "one is missing":
        parts = [first]
    elif case == "one is there twice":
        parts = [first, second, first]
    elif case == "a tile is there twice":
        parts = [first, second, shutil.copytree(first, tmp_path / "again")]
    elif case == "another study":
        manifest = json.loads((second / "manifest.json").read_text())
        (second / "manifest.json").write_text(json.dumps(manifest | {"segments": 20}))
        parts = [second, first]
    elif case == "not at its end":
        (second / "results.json").unlink()
    elif case == "a number that flipped":
        path = second / "sweeps" / "0000.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    else:
        facts = json.loads((second / "study.json").read_text())
        if case == "another window":
            facts["tasks"]["perplexity"]["windows"][3]["tokens_sha"] = "0" * 64
        else:
            del facts["tasks"]
            shutil.copy(second / "study.json", first / "study.json")
            (first / "study.json").write_text(json.dumps(facts))
        (second / "study.json").write_text(json.dumps(facts))
    assert run(["merge", *map(str, parts), "--out", str(tmp_path / "both")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "\nhint: " in error
    assert said in error
    assert not (tmp_path / "both").exists()


def test_a_process_for_each_device(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert evaluate("--device", "cpu,cpu", "--out", str(folder)) == 0
    same(folder, alone)
    capsys.readouterr()
    assert evaluate("--device", "cpu,cpu", "--out", str(folder)) == 2
    assert "--resume continues that run" in capsys.readouterr().err
    assert evaluate("--device", "cpu,cpu,cpu", "--out", str(folder), "--resume") == 2
    assert "found the shards of a run of 2 processes, needed 3" in capsys.readouterr().err
    assert evaluate("--out", str(folder), "--resume") == 2
    assert "as many devices" in capsys.readouterr().err


def test_a_failing_worker_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--device", "cpu,cpu", "--vram", "1MiB") == 2
    said = capfd.readouterr()
    assert said.err.count("error: ") == said.err.count("hint: ") == 1
    assert said.out == ""


def test_torchrun_and_a_worker_that_is_killed(tmp_path: Path) -> None:
    """The gate's logits take more than a tile, and would fit no budget of one tile at a time."""
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert evaluate("--gate", "off", "--out", str(alone)) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts=1", "--monitor-interval=0.2", tiny_study.KILLED,
         *tiny_study.words("--gate", "off", "--vram", "270MiB", "--out", str(folder), "--resume")],
        capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(folder, alone)
    assert "1/2: note: resumed after 1 finished sweep(s): 1 of 2 tiles are there" in done.stderr
    assert done.stdout.count("needle 384") == 1  # the last one prints the table


def test_stop_after_ends_between_sweeps(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--out", str(tmp_path / "run"), "--vram", tiny_study.ONE_TILE, "--resume")
    for sweep in (1, 2, 3):
        assert evaluate(*words, "--stop-after", "0.001s") == 0
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["performance"]["sweeps"] == 1
        assert results["status"] == ("complete" if sweep == TILES else "partial")
        said = capsys.readouterr()
        assert (f"stopped after {sweep} of {TILES} tiles" in said.err) == (sweep < TILES)
    same(tmp_path / "run", alone)


def test_a_time_limit_counts_on_the_longest_sweep() -> None:
    limit = TimeLimit(100.0, time.monotonic() - 90)
    assert limit.allows_another()  # the first always is
    limit.longest = 5.0
    assert limit.allows_another() and not limit.reached
    limit.longest = 15.0
    assert not limit.allows_another() and limit.reached


RANKS = {
    "no such rank": {"RANK": "7", "WORLD_SIZE": "4"},
    "no such task": {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "4"},
    "no ranks at all": {"RANK": "0", "WORLD_SIZE": "0"},
    "no such local rank": {
        "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2",
    },
    "a list of tasks that is none": {
        "SLURM_STEP_TASKS_PER_NODE": "two", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", RANKS, ids=str)
def test_ranks_that_cannot_be_are_refused(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in RANKS[case].items():
        monkeypatch.setenv(name, value)
    assert evaluate() == 2
    said = capsys.readouterr().err
    first, value = next(iter(RANKS[case].items()))
    assert f"error: {first}: found '{value}'" in said
    assert f"hint: unset {first}, or start with" in said


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40), st.integers(1, 9))
def test_every_tile_is_somebodys_and_loads_are_even(costs: list[float], of: int) -> None:
    piles = share(costs, of)
    assert sorted(index for pile in piles for index in pile) == list(range(len(costs)))
    loads = [sum(costs[index] for index in pile) for pile in piles]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(loads))
    assert loads[0] <= sum(costs) / of + max(costs) + 1e-9  # Graham's bound for such lists
    chosen = [Shard(number + 1, of).choose(costs) for number in range(of)]
    assert chosen == piles and all(pile == sorted(pile) for pile in piles)


def test_the_standard_study_is_even_on_two_devices() -> None:
    """Four tiles of windows, the first with the controls; two each."""
    assert share([1.08, 1.0, 1.0, 1.0], 2) == [[0, 3], [1, 2]]


def test_ranks() -> None:
    started = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    shard = shard_of_rank(started)
    assert shard == Shard(4, 8, 1, 2, "RANK") and shard.has_gate and shard.folder == "4-of-8"
    assert shard_of_rank({"RANK": "0", "WORLD_SIZE": "1"}) is None
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"}
    assert shard_of_rank(step) == Shard(6, 6, 2, 3, "SLURM_PROCID")
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}
    last = shard_of_rank(step | uneven)
    assert last == Shard(6, 6, 0, 1, "SLURM_PROCID") and last.has_gate
    assert shard_of_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}) is None  # a batch script
    assert shard_of_rank({}) is None
    with pytest.raises(InputError, match="needed a whole number"):
        shard_of_rank(started | {"RANK": "one"})
    assert parse_shard("2/8") == Shard(2, 8, source="--shard") and parse_shard("2/8").has_gate
    for text in ("0/2", "3/2", "2", "a/b", "-1/2", "1/2/3", ""):
        with pytest.raises(InputError, match="--shard"):
            parse_shard(text)


def test_devices_of_ranks() -> None:
    second = Shard(2, 2, 1, 2, "RANK")
    assert device_of("cuda:0,cuda:1", second) == "cuda:1"
    assert device_of("cpu", second) == "cpu"
    assert device_of("auto", second) == "cpu"  # there is no GPU here
    assert device_of("auto", WHOLE) == "auto"
    with pytest.raises(InputError, match="found 3 devices, needed one for each of 2 processes"):
        device_of("cpu,cpu,cpu", second)
    with pytest.raises(InputError, match="found 0 CUDA devices"):
        device_of("cuda", second)


def test_ranks_need_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate() == 2
    assert "needed a folder that all of them see" in capsys.readouterr().err


def test_durations() -> None:
    found = [parse_duration(text) for text in ("11h", "90m", "3600s", "45", "1h30m", "0.5h")]
    assert found == [39600, 5400, 3600, 45, 5400, 1800]
    for text in ("", "h", "soon", "0s", "5d", "-1h", "1m1h"):
        with pytest.raises(InputError, match="needed a time above 0"):
            parse_duration(text, option="--stop-after")


def test_collect_waits_for_all(shards: list[Path], tmp_path: Path, capsys: Any) -> None:
    """A rank that ends first leaves the rest to the others."""
    from layersweep.cli.job import Job, MachineOptions
    from layersweep.tasks.settings import EvalSettings

    machine = MachineOptions(None, "auto", "auto", "cpu", "auto", "auto", "float32", None)
    job = Job("demo", EvalSettings(), machine, tmp_path, False, None, 0.0, "layersweep eval")
    shutil.copytree(shards[0], tmp_path / "shards" / "1-of-2")
    said: list[str] = []
    assert collect(job, 2, said.append) is None
    assert said == [f"note: 1 of 2 parts are at their end in {tmp_path}/shards"]
    shutil.copytree(shards[1], tmp_path / "shards" / "2-of-2")
    results = collect(job, 2, said.append)
    assert results is not None and results["status"] == "complete"


def test_a_worker_whose_gate_refuses_ends_the_run_with_3(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    demo = Path(__file__).parents[1] / "src/layersweep/demo"
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(demo / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (model / "config.json").write_text(json.dumps(config))
    words = tiny_study.words(
        "--tasks", "ppl", "--device", "cpu,cpu", "--out", str(out), model=model
    )
    assert run(words) == 3
    error = capfd.readouterr().err
    assert error.count("error: gate: a repeated text") == 1
    assert f"details in {out}/shards/2-of-2/diagnosis.json" in error
    results = json.loads((out / "results.json").read_text())
    assert (results["status"], results["gate"]["passed"]) == ("gate_failed", False)
