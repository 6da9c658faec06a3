"""The command line: exit codes, one `error:` and one `hint:` line, nothing read in vain."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_study

from layersweep.cli.app import run
from layersweep.report.store import validate

DEMO = Path(__file__).parents[1] / "src/layersweep/demo"
TEXT = ["--text", str(tiny_study.text_file())]  # short: all of a text is tokenized
SMALL = ["--segments", "2", "--prefix", "64", "--continuation", "16", "--niah-context", "512"]
SMALL += ["--niah-depths", "0.5", "--niah-per-depth", "1"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "layersweep", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


BAD = {
    "unknown arm": (["--kv", "K3W2"], "K3W2", "did you mean"),
    "unknown method": (["--kv", "loyd:K3V2"], "loyd", "did you mean 'lloyd'"),
    "odd bits": (["--kv", "K7V2"], "7 bits", "16"),
    "no arm": (["--kv", "exact"], "needed an arm", "--kv"),
    "layers": (["--kv", "K3V2@layers=4-6"], "found @layers=4-6, needed layers from 0 to 5", "0"),
    "negative segments": (["--segments", "-3"], "--segments: found -3", "--segments"),
    "segments no number": (["--segments", "many"], "'many'", "--segments"),
    "too little text": (["--segments", "100000"], "100000", "--segments"),
    "no prefix": (["--prefix", "0"], "--prefix: found 0", "--prefix"),
    "short continuation": (["--continuation", "1"], "--continuation: found 1", "--continuation"),
    "context of the model": (["--niah-context", "9000"], "8192", "--niah-context"),
    "windows of the model": (["--prefix", "8190"], "8192", "--prefix"),
    "depth": (["--niah-depths", "1.5"], "1.5", "--niah-depths"),
    "depth no number": (["--niah-depths", "deep"], "'deep'", "--niah-depths"),
    "needles": (["--niah-per-depth", "0"], "0", "1 or more"),
    "keys": (["--niah-keys", "0"], "--niah-keys", "--niah-keys"),
    "task": (["--tasks", "mmlu"], "'mmlu'", "--tasks"),
    "cache mode": (["--cache-mode", "lazy"], "'lazy'", "--cache-mode"),
    "gate": (["--gate", "maybe"], "'maybe'", "--gate"),
    "bos": (["--bos", "perhaps"], "'perhaps'", "--bos"),
    "size": (["--vram", "14 bananas"], "14 bananas", "GiB"),
    "small vram": (["--vram", "4MiB"], "needed", "--vram"),
    "small ram": (["--ram", "1MiB"], "needed", "--ram"),
    "device": (["--device", "tpu"], "'tpu'", "--device"),
    "no such gpu": (["--device", "cuda:99"], "cuda:99", "--device cpu"),
    "two devices": (["--device", "cuda:0,cuda:1"], "found 0 CUDA devices", "--device cpu"),
    "a device twice": (["--device", "cuda:0,cuda:0"], "found a device twice", "cuda:0,cuda:1"),
    "shard": (["--shard", "3/2"], "found '3/2'", "--shard 1/4"),
    "shard without a folder": (["--shard", "1/2"], "found no --out", "merge"),
    "stop after": (["--stop-after", "soon"], "found 'soon'", "11h"),
    "gate on two": (["--gate", "only", "--device", "cpu,cpu"], "--gate only", "--device cpu"),
    "dtype": (["--dtype", "float8"], "'float8'", "--dtype"),
    "dtype on the cpu": (["--device", "cpu", "--dtype", "float16"], "float32", "--dtype"),
    "weights": (["--weights", "int3"], "'int3'", "--weights"),
    "seed": (["--seed", "-1"], "--seed", "--seed"),
    "text is no file": (["--text", "/nowhere/text.txt"], "text.txt", ""),
    "no such option": (["--sgements", "80"], "--sgements", "--help"),
    "no number": (["--seed", "long"], "long", "--help"),
    "streamed generation": (
        ["--niah-mode", "generate", "--cache-mode", "streaming"], "generate", "--niah-mode"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_arguments_of_eval(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, found, hint = BAD[case]
    started = time.process_time()  # whoever else computes here is not to blame
    assert run(["eval", "demo", *SMALL, *TEXT, *arguments]) == 2
    assert time.process_time() - started < 10
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    hints = [line for line in said.err.splitlines() if line.startswith("hint: ")]
    assert len(errors) == 1
    assert len(hints) == 1
    assert found in errors[0]
    assert hint in hints[0]
    assert said.out == ""
    assert "Traceback" not in said.err


def test_a_file_where_a_folder_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for arguments in (["eval", "demo", *SMALL, "--out", str(file)], ["eval", str(file)],
                      ["inspect", str(file)], ["plan", str(file)]):  # fmt: skip
        assert run(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert str(file) in said


def test_a_folder_that_holds_a_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert run(["eval", "demo", *SMALL, "--out", str(tmp_path)]) == 2
    assert "manifest of an earlier run" in capsys.readouterr().err


def test_unknown_commands_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate"]) == 2
    assert "error: No such command 'evaluate'" in capsys.readouterr().err
    assert run(["plan", "demo", "--for", "t44"]) == 2
    assert "did you mean t4" in capsys.readouterr().err
    assert run(["plan", "demo", "--segments", "all"]) == 2
    assert "needed a number" in capsys.readouterr().err
    assert run(["plan", "demo", "--weights", "int3"]) == 2
    assert "'int3'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run") / "out"
    done = command("eval", "demo", *SMALL, *TEXT, "--kv", "K3V2,e8:K3V2", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    for line in ("[layout]", "[paths]", "[budget]", "[versions]"):
        assert sum(text.startswith(line) for text in done.stderr.splitlines()) == 1
    return folder, done.stdout


def test_eval_writes_a_valid_result_and_prints_the_arms(small_run: tuple[Path, str]) -> None:
    folder, out = small_run
    results = json.loads((folder / "results.json").read_text())
    validate(results)
    assert results["status"] == "complete"
    assert results["performance"]["sweeps"] == 1
    assert results["performance"]["gate_sweeps"] == 0
    assert results["perplexity"]["noise_floor"]["exact"]["max"] == 0.0
    assert results["perplexity"]["underpowered"] is True
    assert [arm["arm"] for arm in results["perplexity"]["arms"]] == [
        "trellis:K3V2@fit=1@found=1",
        "e8:K3V2",
    ]
    assert results["perplexity"]["arms"][0]["bits_per_element"] == pytest.approx(
        (16 + 63 * (2.5 + 8 / 64) + 16 * 65 / 64 + 16 + 64 / (2 * 64)) / 64
    )
    assert "trellis:K3V2@fit=1@found=1" in out
    assert "NOT PUBLISHABLE" in out
    for name in ("report.html", "windows.csv", "manifest.json"):
        assert (folder / name).stat().st_size > 0
    lines = (folder / "segments.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]


def test_report_and_compare_read_what_eval_wrote(
    small_run: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = small_run
    for form in ("md", "csv", "latex", "html"):
        assert run(["report", str(folder), "--format", form]) == 0
        assert capsys.readouterr().out
    assert run(["compare", str(folder), str(folder)]) == 0
    assert "trellis:K3V2@fit=1@found=1" in capsys.readouterr().out


TINY = ["eval", "demo", "--kv", "int4", "--tasks", "ppl", "--segments", "2", "--prefix", "64"]
TINY += ["--continuation", "16", "--gate", "off", *TEXT]


def ascii_stdout(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """What stdout gets where its encoding is ASCII, as under LC_ALL=C."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    return written


def test_a_run_is_not_lost_to_a_name_that_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny_study.text_file(), tmp_path / os.fsdecode(b"caf\xe9.txt"))
    shutil.copy(Path(__file__).with_name("own_codec.py"), tmp_path / os.fsdecode(b"c\xe9.py"))
    monkeypatch.chdir(tmp_path)
    written = ascii_stdout(monkeypatch)
    out = os.fsdecode(b"r\xe9sultats")
    named = ["--text", os.fsdecode(b"caf\xe9.txt"), "--out", out]
    assert run([*TINY, "--kv", os.fsdecode(b"c\xe9.py:Rounded:K3V2"), *named]) == 0
    assert b"caf\\xe9.txt, 2 windows" in written.getvalue()
    results = json.loads((tmp_path / out / "results.json").read_text("utf-8"))
    validate(results)
    assert results["protocol"]["text_source"] == "caf\\xe9.txt"
    assert "caf\\xe9.txt" in (tmp_path / out / "report.html").read_text("utf-8")
    for form in ("md", "csv", "csv-arms", "latex", "html"):
        assert run(["report", out, "--format", form]) == 0
    (tmp_path / out / "results.json").unlink()
    assert run([*TINY, "--kv", os.fsdecode(b"c\xe9.py:Rounded:K3V2"), *named, "--resume"]) == 0


def test_a_table_is_not_lost_to_an_encoding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = shutil.copy(tiny_study.text_file(), tmp_path / "проза.txt")
    written = ascii_stdout(monkeypatch)
    assert run([*TINY, "--text", str(text)]) == 0
    assert b"\\u043f\\u0440" in written.getvalue()
    assert b"int4" in written.getvalue()


# --- how it ends ---------------------------------------------------------------------------------


def test_an_unfinished_run_is_told_from_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/manifest.json").write_text("{}")
    (tmp_path / "many/shards/1-of-2").mkdir(parents=True)
    for folder in ("run", "many"):
        assert run(["report", str(tmp_path / folder)]) == 2
        said = capsys.readouterr().err
        assert (
            f"{folder}: found no results.json, needed the folder of a run that came to its" in said
        )
        assert "--resume" in said
    assert run(["report", str(tmp_path)]) == 2
    assert "found no such file" in capsys.readouterr().err


def test_ctrl_c_is_told_with_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layersweep.study.run.StudyRun.measure", stop)
    assert run([*TINY, "--out", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err
    assert "error: interrupted\n" in said
    kept = (
        f"hint: finished sweeps are kept in {tmp_path}/run: --resume continues after them; details"
    )
    assert kept in said
    assert run(TINY) == 130
    said = capsys.readouterr().err
    assert said.endswith("error: interrupted\nhint: without --out nothing is kept\n")
    monkeypatch.setattr("layersweep.report.store.load_results", stop)
    assert run(["report", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_stdout_that_is_full_or_closed(
    small_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ([], ["--format", "csv"]):
        with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert run(["report", str(small_run[0]), *form]) == 1
    said = capsys.readouterr().err
    assert said.count("error: stdout: cannot be written (No space left on device)\n") == 2
    assert "hint: make room\n" in said
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert run(["report", str(small_run[0]), "--format", "csv"]) == 1
    assert capsys.readouterr().err == ""


def test_a_report_that_cannot_be_written(
    small_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "report.html")

    monkeypatch.setattr("layersweep.report.html.write_atomically", refuse)
    assert run(["report", str(small_run[0]), "--format", "html"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "error: report.html: Read-only file system\nhint: mount the file system for writing\n"
    )


def test_json_is_all_that_stdout_holds(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*TINY, "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    validate(results)
    assert results["needle"] is None


def test_plan_and_inspect_read_headers_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", "--for", "t4"]) == 0
    out = capsys.readouterr().out
    assert "assumed" in out
    assert "peak, predicted" in out
    assert run(["inspect", "demo"]) == 0
    assert "router: nf4" in capsys.readouterr().out


def test_a_refused_gate_ends_with_3_and_a_diagnosis(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(DEMO / "model", model)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (model / "config.json").write_text(json.dumps(config))
    words = ["eval", str(model), *TEXT, "--gate", "only", "--out", str(out)]
    assert run(words) == 3
    error = capfd.readouterr().err
    assert error.count("error: gate: ") == 1
    assert f"details in {out}/diagnosis.json" in error
    diagnosis = json.loads((out / "diagnosis.json").read_text())
    assert diagnosis["kind"] == "GateError"
    assert "repeated text" in diagnosis["error"]
    assert diagnosis["layout"]["layers.0.router"].startswith("model.layers.0")
    assert diagnosis["versions"]["torch"]
    assert diagnosis["memory"]["process_bytes"] > 0
    assert len(diagnosis["events"]) >= 4
    results = json.loads((out / "results.json").read_text())
    assert (results["status"], results["publishable"]) == ("gate_failed", False)
