"""The project around the code: import order, import cost, make targets, README commands."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from layersweep.cli.app import app

PROJECT = Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "src/layersweep"

# Data flows from left to right; nothing imports from its right.
ORDER = (
    *("errors", "problems", "units", "notebook", "progress", "environment", "demo", "kernels"),
    *("collector", "families", "checkpoint", "stream", "probes", "model", "kv", "sweep", "text"),
    *("statistics", "tasks", "runs"),
    *("generate", "study", "report", "api", "integrations", "bench", "kaggle", "serve"),
    *("cli", "__main__"),
)


def imported_modules(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names of every import, also those inside functions; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield ".".join(module)
            yield from (".".join([*module, alias.name]) for alias in node.names)


def violations(source: Path, order: tuple[str, ...]) -> list[str]:
    """'file imports module' for each import against the order; the root __init__ may use all."""
    found = []
    for path in sorted(source.rglob("*.py")):
        place = path.relative_to(source).with_suffix("").parts
        if place == ("__init__",):
            continue
        package = ["layersweep", *place[:-1]]
        for module in imported_modules(ast.parse(path.read_text("utf-8")), package):
            parts = module.split(".")
            if parts[0] != "layersweep" or len(parts) < 2 or parts[1] not in order:
                continue  # another package, or a name of the root itself
            if order.index(parts[1]) > order.index(place[0]):
                found.append(f"{'/'.join(place)} imports {module}")
    return found


def test_every_folder_has_its_place_in_the_order() -> None:
    there = {path.stem for path in SOURCE.glob("*.py")} | {
        path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))
    }
    assert there - {"__init__"} <= set(ORDER)
    rooms = {"families", "checkpoint", "stream", "model", "kv", "sweep", "text", "tasks", "runs"}
    assert rooms | {"statistics", "generate", "study", "report", "bench", "kaggle", "cli"} <= there


def test_folders_import_only_from_earlier_ones() -> None:
    assert violations(SOURCE, ORDER) == []


ENGINE = ("families", "checkpoint", "stream", "model", "kv", "sweep")
FRONTENDS = ("notebook", "progress", "probes", "cli")


def test_the_engine_knows_no_frontend() -> None:
    """What it has to say, it says to who is given to it."""
    rest = [name for name in ORDER if name not in FRONTENDS]
    found = violations(SOURCE, (*rest, *FRONTENDS))
    assert [line for line in found if line.split("/")[0] in ENGINE] == []


def test_key_value_codecs_know_nothing_of_the_engine() -> None:
    engine_after_codecs = tuple(name for name in ORDER if name not in ("stream", "model"))
    stricter = (*engine_after_codecs, "stream", "model")
    found = [line for line in violations(SOURCE, stricter) if line.startswith("kv/")]
    assert found == []


def test_a_family_is_read_without_torch_and_transformers() -> None:
    code = (
        "import sys; from layersweep.families.registry import describe; "
        "described = describe({'model_type': 'mixtral', 'hidden_size': 0}, 'config.json'); "
        "print(len(described.problems) > 1, *({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_reports_format_and_compute_nothing() -> None:
    found = [
        f"{path.name} imports {module}"
        for path in sorted((SOURCE / "report").rglob("*.py"))
        for module in imported_modules(ast.parse(path.read_text("utf-8")), ["layersweep"])
        if module.split(".")[:2] == ["layersweep", "statistics"] or module in ("numpy", "scipy")
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import layersweep.sweep.loop",
        "from layersweep import sweep",
        "from layersweep.sweep.loop import run",
        "from ..sweep import loop",
        "def f():\n    from layersweep.sweep import loop",
    ],
)
def test_an_import_against_the_order_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv/codec.py").write_text(f"from layersweep.errors import InputError\n{line}\n")
    assert any("kv/codec imports layersweep.sweep" in one for one in violations(tmp_path, ORDER))


def test_importing_layersweep_is_quick_and_brings_neither_torch_nor_accelerate() -> None:
    code = (
        "import time; started = time.perf_counter(); import layersweep; "
        "seconds = time.perf_counter() - started; import sys; "
        "print(seconds, *({'torch', 'accelerate', 'transformers'} & set(sys.modules)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    answers = [run.stdout.split() for run in runs]
    assert [answer[1:] for answer in answers] == [[], [], []]
    assert min(float(answer[0]) for answer in answers) < 0.5


def test_records_and_merge_know_neither_torch_nor_a_model() -> None:
    """A result is put together on a login node, where neither is."""
    runs = sorted(path.stem for path in (SOURCE / "runs").glob("*.py"))
    assert {"files", "finished", "folder", "merge", "record"} <= set(runs)
    modules = ", ".join(f"layersweep.runs.{name}" for name in runs if name != "__init__")
    code = (
        f"import sys, {modules}\nfrom layersweep.cli.app import run\n"
        "code = run(['merge', 'nowhere'])\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('layersweep.')}\n"
        "print(code, *({'torch', 'transformers'} & set(sys.modules)), "
        "*({'stream', 'model', 'sweep'} & rooms))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]
    assert "error: nowhere: found no manifest.json" in done.stderr


def test_accelerate_is_neither_imported_nor_required() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        names = {name.split(".")[0] for name in imported_modules(tree, ["layersweep"])}
        called = {
            argument.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for argument in node.args[:1]
            if isinstance(argument, ast.Constant)
        }
        assert "accelerate" not in names | called, path
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
    listed = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    listed += [
        name for extra in project["project"]["optional-dependencies"].values() for name in extra
    ]
    assert not [name for name in listed if name.startswith("accelerate")]


def test_nothing_in_the_package_is_ignored_by_git() -> None:
    """What git ignores, hatchling leaves out of the wheel: the demo and the schema must be in."""
    data = [
        path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    names = "\n".join(str(path.relative_to(PROJECT)) for path in data)
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input=names,
        capture_output=True,
        text=True,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 1, done.stdout  # 1: none of them is ignored
    assert SOURCE / "report/results.schema.json" in data
    demo = sum(path.stat().st_size for path in data if "demo" in path.parts)
    assert 500_000 < demo < 20_000_000


# --- make ---------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def planned(*arguments: str) -> list[str]:
    """The commands that make would run on a fresh machine, without running them."""
    command = ["make", "--dry-run", "VENV=no-venv-yet", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", " ").splitlines()


def position(lines: list[str], *words: str) -> int:
    (place,) = [at for at, line in enumerate(lines) if all(word in line for word in words)]
    return place


@needs_make
def test_make_demo_installs_torch_first_and_runs_the_study() -> None:
    lines = planned("demo")
    steps = [
        position(lines, "sh tools/find-python.sh no-venv-yet"),
        position(lines, "sh tools/say-download.sh"),
        position(lines, "pip", "install", "--constraint constraints.txt", " torch"),
        position(lines, "pip", "install", "--constraint constraints.txt", "--editable ."),
        position(lines, "rm -rf demo-results"),
        position(lines, "layersweep eval demo", "--kv K3V2,K4V2,e8:K3V2,e8:K4V2"),
    ]
    assert steps == sorted(steps)
    assert "--niah-per-depth 2" in lines[steps[-1]]
    assert "torch==2.13.0" in (PROJECT / "constraints.txt").read_text("utf-8")


@needs_make
def test_make_demo_real_makes_the_model_first_and_once(tmp_path: Path) -> None:
    lines = planned("demo-real", "REAL=no-models-yet")
    steps = [
        position(lines, "pip", "install", "--constraint constraints.txt", "--editable ."),
        position(lines, "pip", "install", "--constraint constraints.txt", " gguf"),
        position(lines, "bin/python tools/make_smollm2.py no-models-yet"),
        position(lines, "layersweep eval no-models-yet/smollm2-nf4", "--segments 16"),
    ]
    assert steps == sorted(steps)
    assert "--text tools/prose/handbook.txt" in lines[steps[-1]]
    ignored = (PROJECT / ".gitignore").read_text("utf-8").splitlines()
    assert {"/real-models/", "/demo-real-results/"} <= set(ignored)


@needs_make
def test_make_test_runs_every_check_and_ci_runs_make_test() -> None:
    lines = planned("test")
    checks = [position(lines, f"no-venv-yet/bin/{check}") for check in ("ruff check", "mypy")]
    checks.append(position(lines, "-m pytest"))
    position(lines, "ruff format --check")
    assert position(lines, "--group dev") < min(checks)
    ci = PROJECT / ".ci/run"
    assert ci.stat().st_mode & stat.S_IXUSR
    assert "make test" in ci.read_text("utf-8").splitlines()[-1]


@needs_make
def test_torch_index_is_for_torch_alone() -> None:
    lines = planned("test", "TORCH_INDEX=https://wheels.example/cpu")
    (with_index,) = [line for line in lines if "--index-url" in line]
    assert with_index.endswith(' --index-url "https://wheels.example/cpu" torch')


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def shell(script: str, folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code and all output of a tools/ script that finds only the commands in `folder`."""
    for tool in ("rm", "sh", "mkdir", "uname"):
        if not (folder / tool).exists():
            (folder / tool).symlink_to(shutil.which(tool) or tool)
    done = subprocess.run(
        [shutil.which("sh") or "sh", str(PROJECT / "tools" / script), *arguments],
        env={"PATH": str(folder), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_find_python_names_every_candidate_that_will_not_do(tmp_path: Path) -> None:
    command(tmp_path, "python3.13", "echo 'python3.13: command not found' >&2; exit 127")
    command(tmp_path, "python3", 'case "$2" in *exit*) exit 1;; *) echo 3.9.18;; esac')
    code, output = shell("find-python.sh", tmp_path, str(tmp_path / "venv"))
    assert code == 2
    assert f"{tmp_path}/python3.13: does not run" in output
    assert f"{tmp_path}/python3: 3.9.18, too old" in output
    assert "needed Python >= 3.11" in output
    assert not (tmp_path / "venv").exists()


def test_find_python_without_any(tmp_path: Path) -> None:
    code, output = shell("find-python.sh", tmp_path, str(tmp_path / "venv"))
    assert code == 2
    assert "found: no python on the path" in output


def test_find_python_takes_the_first_that_works(tmp_path: Path) -> None:
    command(tmp_path, "python3.13", "exit 127")
    venv_alone = f'if [ "$1" = -m ]; then mkdir -p "$3/bin"; else exec {sys.executable} "$@"; fi'
    command(tmp_path, "python3.12", venv_alone)
    code, output = shell("find-python.sh", tmp_path, str(tmp_path / "venv"))
    version = ".".join(str(part) for part in sys.version_info[:3])
    assert (code, output) == (0, f"python: found {tmp_path}/python3.12, {version}\n")
    assert (tmp_path / "venv/bin").is_dir()


def test_find_python_can_be_told_which(tmp_path: Path) -> None:
    command(tmp_path, "python3", f'exec {sys.executable} "$@"')
    venv = str(tmp_path / "venv")
    code, output = shell("find-python.sh", tmp_path, venv, PYTHON="python3.99")
    assert code == 2
    assert "no python on the path" in output


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="has a driver")
@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA wheel is Linux's")
def test_the_download_is_announced_where_there_is_no_driver(tmp_path: Path) -> None:
    code, output = shell("say-download.sh", tmp_path)
    assert code == 0
    assert "no NVIDIA driver was found" in output
    assert "CUDA libraries of several GB that this machine cannot use" in output
    assert "add TORCH_INDEX=URL" in output
    _, output = shell("say-download.sh", tmp_path, TORCH_INDEX="https://wheels.example/cpu")
    assert "will be downloaded from https://wheels.example/cpu" in output


def test_the_download_is_announced_where_there_is_a_driver(tmp_path: Path) -> None:
    command(tmp_path, "nvidia-smi", "exit 0")
    code, output = shell("say-download.sh", tmp_path)
    assert code == 0
    assert "an NVIDIA driver was found" in output
    assert "cannot use" not in output


# --- README -------------------------------------------------------------------------------------

README = (PROJECT / "README.md").read_text("utf-8")


def readme_command_lines(text: str) -> list[str]:
    """Lines `layersweep ...` of fenced blocks (continuations joined) and of inline code."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(
        r"`(!?layersweep [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    started = r"^(!|torchrun .* -m (?=layersweep )|srun .*?(?=layersweep ))"  # ! in a notebook
    lines = [re.sub(started, "", line) for line in [*lines, *inline]]
    return [line for line in lines if line.startswith("layersweep ")]


def test_the_two_commands_are_in_the_readme_and_in_the_makefile() -> None:
    makefile = (PROJECT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"\bmake (demo|test|lint|clean)\b", README)) | {"demo", "test"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert f"make {target}" in README


NAMES = ("reproduce", "kaggle", "notebooks", "cluster", "lm-eval", "serve", "generation")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_and_options_exist(page: str) -> None:
    registered = get_command(app).commands  # type: ignore[attr-defined]
    lines = readme_command_lines((PROJECT / page).read_text("utf-8"))
    assert len(lines) >= 1
    for line in lines:
        name = line.split()[1]
        assert name in registered, line
        own, _, study = line.partition(" -- ")  # kaggle takes the options of eval behind --
        for words, command in ((own, name), (study and f" {study}", "eval")):
            found = registered[command]
            if hasattr(found, "commands") and len(words.split()) > 2:  # bench study, codec check
                found = found.commands[words.split()[2]]
            options = {text for option in found.params for text in option.opts}
            assert set(re.findall(r"(?<=\s)--[a-z-]+", words)) <= options | {"--help"}, line


def test_links_to_files_lead_somewhere() -> None:
    pages = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *(PROJECT / "docs").glob("*.md")]
    assert len(pages) >= 5
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_reliability_is_what_was_measured() -> None:
    tool = runpy.run_path(str(PROJECT / "tools/measure_reliability.py"))
    lines = [json.loads(line) for line in tool["LINES"].read_text("utf-8").splitlines()]
    assert tool["table"](lines) in (PROJECT / "docs/reliability.md").read_text("utf-8")


def test_the_tables_of_real_models_are_what_was_measured() -> None:
    tool = runpy.run_path(str(PROJECT / "tools/measure_real.py"))
    lines = (PROJECT / "docs/measurements/real.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert tool["table"](found) in (PROJECT / "docs/codecs.md").read_text("utf-8")
    windows = {line["segments"] for line in found if "ppl" in line and "segments" in line}
    assert (len(lines), windows) == (199, {80})
