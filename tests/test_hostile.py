"""Checkpoints from strangers: refused by name, quickly and in little memory, never executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from fuzz_checkpoint import Fuzzer
from hostile_checkpoints import CASES, FOUND_BY_FUZZER, build
from hostile_damages import EXECUTED, TEXT, base, remote_code, write_bomb
from hostile_run import GATE, Met, faults

from layersweep.checkpoint import header, strict_json
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.cli.app import run
from layersweep.errors import InputError
from layersweep.text.chat import Message, render_chat

RUNNER = Path(__file__).with_name("hostile_run.py")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- the corpus ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def met() -> dict[str, list[Met]]:
    """What the command line said to every case; "" are the valid checkpoints."""
    done = subprocess.run([sys.executable, RUNNER], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Met]] = {}
    for line in done.stdout.splitlines()[:-1]:
        one = Met(**json.loads(line))
        found.setdefault(one.case, []).append(one)
    return found


def test_the_checkpoints_that_are_damaged_are_valid_before(met: dict[str, list[Met]]) -> None:
    assert [one.err for one in met[""] if one.code] == []
    assert [(one.command, one.code) for one in met[""]] == [
        (command, 0) for _ in range(3) for command in ("inspect", "eval", "eval")
    ]
    assert len(CASES) >= 60
    assert set(FOUND_BY_FUZZER) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_refused(name: str, met: dict[str, list[Met]]) -> None:
    assert met[name]
    for one in met[name]:
        assert faults(one) == [], f"{one.command}: {one.out}{one.err}"


def test_a_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    name = "scale-nan"
    folder, text = build(name, tmp_path / name), tmp_path / "text.txt"
    text.write_text(TEXT)
    words = [word.format(folder=folder, text=text) for word in GATE]
    line = [sys.executable, "-m", "layersweep", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert faults(Met(name, "eval", done.returncode, "", done.stderr, 0, 0, False)) == []


# --- nothing is executed, links as the hub makes them --------------------------------------------


def accepted(folder: Path, tmp_path: Path) -> bool:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    gate = [word.format(folder=folder, text=text) for word in GATE]
    return run(["inspect", str(folder)]) == run(gate) == 0


def test_code_and_pickles_beside_a_sound_checkpoint_are_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base(2), folder)
    remote_code(folder)
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pkl"):
        write_bomb(folder / name, folder)
    assert accepted(folder, tmp_path)
    assert not (folder / EXECUTED).exists()
    pickle.loads((folder / "model.pt").read_bytes())  # the bomb does go off
    assert (folder / EXECUTED).exists()


def test_the_remote_code_of_the_corpus_does_run_where_it_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base(1), folder)
    remote_code(folder)
    exec((folder / "tokenization_x.py").read_text())
    assert (folder / EXECUTED).exists()


def test_a_hub_snapshot_of_links_is_evaluated(tmp_path: Path) -> None:
    blobs, snapshot = (
        tmp_path / "models--a--b" / part for part in ("blobs", "snapshots/" + COMMIT)
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base(2).iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert accepted(snapshot, tmp_path)


# --- JSON and templates --------------------------------------------------------------------------


def test_strict_json_reads_what_json_reads_and_names_repeated_keys() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "\xc3\xa9"]}') == ({"a": [1, 2.5, None, "é"]}, [])
    assert parse_json(b'{"a": 1, "b": {"c": 2, "c": 3}, "a": 4}') == (
        {"a": 4, "b": {"c": 3}},
        ["a", "c"],
    )
    deepest = strict_json.DEEPEST
    assert parse_json(b"[" * deepest + b"]" * deepest)[1] == []


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"[" * (strict_json.DEEPEST + 1) + b"]" * (strict_json.DEEPEST + 1), "nested deeper"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper"),
        (b"[" * 100_000, "nested deeper"),
        (b"[" + b"0," * strict_json.MOST_VALUES + b"0]", "more than"),
        (b'"' + b"a" * strict_json.LARGEST_JSON + b'"', "bytes of JSON"),
        ('{"a": 1}'.encode("utf-16"), "no JSON"),
        (b"9" * 5000, "no JSON"),
        (b"", "no JSON"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[:8].decode("latin-1"),
)
def test_strict_json_refuses_what_would_cost_too_much(raw: bytes, found: str) -> None:
    with pytest.raises(UnusableJson, match=found):
        parse_json(raw)


def render(template: str, said: str = "", tokens: Mapping[str, str] = MappingProxyType({})) -> str:
    return render_chat(template, [Message("user", said)], tokens)


def test_a_template_is_rendered_apart_and_ends_when_its_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what the checkpoint's folder holds is not imported instead of a library
    (tmp_path / "jinja2.py").write_text(f"open({str(tmp_path / EXECUTED)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert render("{{ a }}{{ messages[0].content }}", "é\0", {"a": "<s>"}) == "<s>é\0"
    assert not (tmp_path / EXECUTED).exists()
    started = time.monotonic()
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="more than 1 s or 512 MiB"):
        render(loop)
    assert time.monotonic() - started < 10
    with pytest.raises(InputError, match="5000000 characters"):
        render("{{ 'a' * 5000000 }}")


# --- the fuzzer ----------------------------------------------------------------------------------


def fuzzed(executions: int, seed: int, out: Path | None = None) -> Fuzzer:
    fuzzer = Fuzzer(random.Random(seed), out)
    fuzzer.run(lambda: fuzzer.executions < executions)
    return fuzzer


def test_what_the_fuzzer_makes_is_read_or_refused() -> None:
    fuzzer = fuzzed(400, seed=0)
    assert fuzzer.findings == {}
    assert fuzzer.accepted > 15
    assert len(fuzzer.lines) > 500


def test_the_fuzzer_finds_a_planted_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_are_counts", lambda value: isinstance(value, list))
    fuzzer = fuzzed(300, seed=0, out=tmp_path)
    assert any("header.py" in where for where in fuzzer.findings)
    folder = min(tmp_path.iterdir())
    assert "Traceback" in (folder / "why.txt").read_text()
    assert os.path.getsize(folder / "config.json") > 0
