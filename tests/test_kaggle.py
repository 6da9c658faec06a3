"""`layersweep kaggle`: what it writes, what it refuses, and its kernels in Kaggle's layout."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_study
from hypothesis import given
from hypothesis import strategies as st
from kaggle_layout import Kaggle
from small_shapes import small_shape
from test_checkpoint_hub import COMMIT, Hub

import layersweep
from layersweep.checkpoint import open_checkpoint
from layersweep.checkpoint.layout import demo_folder
from layersweep.checkpoint.synth import write_synthetic
from layersweep.checkpoint.synth_shapes import SHAPES
from layersweep.cli.app import run
from layersweep.errors import BudgetError, CheckpointError, InputError
from layersweep.kaggle import kernel, sources
from layersweep.kaggle.folders import filled_in
from layersweep.kaggle.metadata import Id
from layersweep.kaggle.sources import JOB_BYTES, ModelSource, parse_model, share_out
from layersweep.kaggle.wheel import write_wheel
from layersweep.study.rehearsal import reaching_every_kind
from layersweep.study.study import prepare_study
from layersweep.sweep.model import load
from layersweep.tasks.settings import EvalSettings

TESTS = Path(__file__).parent
TINY = (
    "--segments", "2", "--prefix", "64", "--continuation", "32", "--niah-context", "384",
    "--niah-depths", "0.5", "--niah-per-depth", "20",
)  # fmt: skip
SWEEPS = 3  # of a tile each, with the least budget: one of windows and two of needles

numbers = runpy.run_path(str(TESTS.parent / "tools/kill_and_resume.py"))["numbers"]


def write(folder: Path, *more: str, study: tuple[str, ...] = TINY) -> int:
    """`layersweep kaggle` for a CPU; options in `more` that come again count."""
    arguments = ["--id", "me/study", "--kv", "e8:K3V2", "--device", "cpu", "--offline", *more]
    return run(["kaggle", str(folder), *arguments, "--", *study])


@functools.cache
def least() -> tuple[str, str]:
    """The smallest --vram that holds a tile of TINY, from the refusals of smaller ones."""
    settings = EvalSettings(
        kv="e8:K3V2", segments=2, prefix=64, continuation=32, niah_contexts=(384,),
        niah_depths=(0.5,), niah_per_depth=20,
    )  # fmt: skip
    size = "1MiB"
    for _ in range(5):
        model = load("demo", device="cpu", vram=size)
        try:
            prepare_study(model, settings, kept=True)
        except BudgetError as refusal:
            found = re.search(r"needed ([\d.]+) MiB", str(refusal))
            assert found is not None
            size = f"{float(found[1]) + 0.1}MiB"  # it is printed rounded
        else:
            return "--vram", size
    raise AssertionError(size)


def metadata(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "kernel-metadata.json").read_text())
    return content


def settings_of(folder: Path) -> dict[str, Any]:
    """SETTINGS of a written kernel, by its syntax tree."""
    for node in ast.parse((folder / "kernel.py").read_text("utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "SETTINGS":
            assert node.value is not None
            content: dict[str, Any] = ast.literal_eval(node.value)
            return content
    raise AssertionError("no SETTINGS")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kaggle") / "kernels"
    assert write(folder, study=(*TINY, *least())) == 0
    return folder


# --- what is written ------------------------------------------------------------------------------


def test_a_run_for_two_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kaggle", str(tmp_path / "k"), "--id", "me/study", "--kv", "K3V2,K4V2"]) == 0
    said = capsys.readouterr().out
    steps = [
        f"kaggle datasets create -p {tmp_path}/k/wheels",
        f"kaggle kernels push -p {tmp_path}/k/rehearse",
        f"kaggle kernels push -p {tmp_path}/k/run",
    ]
    assert [said.index(step) for step in steps] == sorted(said.index(step) for step in steps)
    assert "kaggle quota" in said
    found = metadata(tmp_path / "k/run")
    assert (found["enable_gpu"], found["machine_shape"]) == (True, "NvidiaTeslaT4")
    assert found["enable_internet"] is True
    assert settings_of(tmp_path / "k/run")["gpus"] == 2
    study = settings_of(tmp_path / "k/run")["study"]
    assert study == ["--kv", "K3V2,K4V2", "--device", "cuda:0,cuda:1", "--stop-after", "11h"]
    quiet = metadata(tmp_path / "k/rehearse")
    assert quiet["enable_gpu"] is False and "machine_shape" not in quiet


def test_what_a_rehearsal_and_a_plan_are_given(pushed: Path) -> None:
    found = settings_of(pushed / "rehearse")
    assert "--vram" not in found["rehearsal"]  # of another machine
    assert found["rehearsal"][-4:] == ["--device", "cpu", "--rehearse", "2"]
    assert found["plan"][-2:] == ["--for", "t4x2"]
    assert "--niah-depths" not in found["plan"] and "--niah-per-depth" in found["plan"]
    assert metadata(pushed / "rehearse")["enable_internet"] is False


def test_mounts(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("words " * 9)
    study = ("--text", str(text))
    assert write(tmp_path / "k", "--model", "dataset:you/weights", study=study) == 0
    assert metadata(tmp_path / "k/run")["dataset_sources"] == ["me/study-wheels", "you/weights"]
    model = "you/mixtral/pyTorch/8x7b/1"
    earlier = ("--resume-from", "me/study-run")
    assert write(tmp_path / "k", "--model", f"kaggle-model:{model}", *earlier, study=study) == 0
    found = metadata(tmp_path / "k/run")
    assert (found["model_sources"], found["kernel_sources"]) == ([model], ["me/study-run"])
    assert metadata(tmp_path / "k/rehearse")["kernel_sources"] == []
    assert (tmp_path / "k/wheels/t.txt").read_text() == text.read_text()
    study_words = settings_of(tmp_path / "k/run")["study"]
    assert study_words[study_words.index("--text") + 1] == "{files}/t.txt"


def test_the_kernel_is_one_file_that_needs_nothing_of_ours(pushed: Path) -> None:
    for job in ("rehearse", "run"):
        assert sorted(path.name for path in (pushed / job).iterdir()) == [
            "kernel-metadata.json", "kernel.py",
        ]  # fmt: skip
        tree = ast.parse((pushed / job / "kernel.py").read_text("utf-8"))
        imported = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )
        }  # fmt: skip
        assert "layersweep" not in imported


def test_settings_survive_whatever_they_hold() -> None:
    template = Path(kernel.__file__).read_text("utf-8")
    words = {"text": "quotes ' \" and \\ and\nlines", "none": None, "nested": {"a": [1, 2.5]}}
    tree = ast.parse(filled_in(template, words))
    (found,) = (n for n in tree.body if isinstance(n, ast.AnnAssign))
    assert found.value is not None and ast.literal_eval(found.value) == words


def test_the_wheelhouse_never_has_torch(pushed: Path, tmp_path: Path) -> None:
    (wheel,) = (pushed / "wheels").glob("*.whl")
    assert wheel.name.startswith("layersweep-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"layersweep/kaggle/kernel.py", "layersweep/demo/model/tokenizer.json"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    (tmp_path / "again").mkdir()
    assert write_wheel(tmp_path / "again").read_bytes() == wheel.read_bytes()
    for name in ("torch", "triton", "nvidia_cublas_cu12", "nvidia-cudnn"):
        other = shutil.copy(wheel, tmp_path / f"{name}-2.10.0-cp312-cp312-linux_x86_64.whl")
        assert write(tmp_path / "k", "--wheel", str(other)) == 2
    other = shutil.copy(wheel, tmp_path / "tiny-1.0-py3-none-any.whl")
    assert write(tmp_path / "k", "--wheel", str(other)) == 0
    assert len(list((tmp_path / "k/wheels").glob("*.whl"))) == 2
    assert write(tmp_path / "k", "--wheel", str(wheel)) == 0  # ours, but given
    assert [path.name for path in (tmp_path / "k/wheels").glob("*.whl")] == [wheel.name]


# --- Kaggle's own client --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[Any]]]:
    """Kaggle's client and the requests that it would have sent. Importing it authenticates, from
    the environment or files of the user: it sees neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))
        patch.setenv("KAGGLE_USERNAME", "me")
        patch.setenv("KAGGLE_KEY", "0" * 32)
        reason = "the kaggle client is in the dev group of pyproject.toml"
        requests = pytest.importorskip("requests", reason=reason)
        extended = pytest.importorskip("kaggle.api.kaggle_api_extended", reason=reason)
        sent: list[Any] = []

        def send(session: object, request: Any, **options: object) -> Any:
            sent.append(request)
            answer = requests.Response()
            answer.status_code = 404 if "Status" in request.url else 200
            answer.request, answer.url, answer._content = request, request.url, b"{}"
            return answer

        patch.setattr(requests.Session, "send", send)
        api = extended.KaggleApi()
        api.authenticate()
        yield api, sent


@pytest.mark.parametrize("device", ["cpu", "cuda:0,cuda:1"])
def test_the_client_accepts_the_metadata(
    tmp_path: Path, client: tuple[Any, list[Any]], device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api, sent = client
    text = tmp_path / "t.txt"
    text.write_text("words " * 9)
    assert write(
        tmp_path / "k", "--device", device, "--model", "kaggle-model:you/mixtral/pyTorch/8x7b/1",
        "--resume-from", "me/study-run", study=("--text", str(text)),
    ) == 0  # fmt: skip
    capsys.readouterr()
    for job in ("rehearse", "run"):
        sent.clear()
        api.kernels_push(str(tmp_path / "k" / job))
        assert capsys.readouterr().out == ""  # no complaint about title and id
        (request,) = sent
        body = json.loads(request.body)
        gpu = job == "run" and device != "cpu"
        assert (body["slug"], body["newTitle"]) == (f"me/study-{job}", f"study {job}")
        assert (body["enableGpu"], body["enableInternet"]) == (gpu, False)
        assert body.get("machineShape") == ("NvidiaTeslaT4" if gpu else None)
        assert body["datasetDataSources"] == ["me/study-wheels"]
        assert body["modelDataSources"] == ["you/mixtral/pyTorch/8x7b/1"]
        assert body.get("kernelDataSources") == (["me/study-run"] if job == "run" else None)
        assert body["text"] == (tmp_path / "k" / job / "kernel.py").read_text("utf-8")
        assert body["kernelType"] == "script" and body["isPrivate"] is True


def test_the_client_accepts_the_wheels(
    pushed: Path, client: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    api, sent = client
    sent.clear()
    uploaded: list[str] = []
    monkeypatch.setattr(
        api, "upload_files", lambda request, resources, folder, *more: uploaded.append(folder)
    )
    api.dataset_create_new(str(pushed / "wheels"))
    assert uploaded == [str(pushed / "wheels")]
    body = json.loads(sent[-1].body)
    assert (body["ownerSlug"], body["slug"]) == ("me", "study-wheels")
    assert body["title"] == "study wheels"
    assert body["isPrivate"] is True


def test_the_client_has_the_commands_that_we_name(
    tmp_path: Path, client: tuple[Any, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from kaggle import cli

    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    commands.choices = cli.Help.kaggle_choices
    for name in ("datasets", "kernels", "auth", "quota"):
        getattr(cli, f"parse_{name}")(commands)
    page = (TESTS.parent / "docs/kaggle.md").read_text("utf-8")
    assert write(tmp_path / "k") == 0
    printed = re.findall(r"(?m)^  (kaggle .*?)(?:    .*)?$", capsys.readouterr().out)
    documented = re.findall(r"(?m)^kaggle .*$|(?<=`)kaggle [a-z]+ [a-z]+ -[^`]+", page)
    assert len(printed) == 4 and len(documented) >= 9
    for line in [*printed, *documented, "kaggle quota"]:
        parser.parse_args(shlex.split(line)[1:])  # exits where it is unknown


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "study", "says"),
    [
        (("--id", "study"), (), "--id: found 'study', needed USER/SLUG"),
        (("--id", "me/Kv Study"), (), "--id me/kv-study"),
        (("--id", "me/" + "a" * 42), (), "at most 41"),
        (("--model", "nonsense"), (), "--model: found 'nonsense', needed demo"),
        (("--model", "dataset:weights"), (), "needed demo, ORG/NAME"),
        (("--model", "kaggle-model:a/b/c/d"), (), "needed demo, ORG/NAME"),
        (("--model", "dataset:a/b"), (), "--offline: found no --text"),
        (("--revision", "main"), (), "--revision: found 'main' for demo"),
        (("--kv", "K3V9"), (), "K3V9"),
        (("--kv", "exact"), (), "needed an arm besides"),
        (("--device", "cuda:0,cuda:2"), (), "needed cuda:0,cuda:1, cuda:0 or cpu"),
        (("--stop-after", "eleven"), (), "--stop-after: found 'eleven'"),
        (("--resume-from", "study"), (), "--resume-from: found 'study'"),
        (("--wheel", "pyproject.toml"), (), "found no wheel"),
        ((), ("--segmets", "2"), "No such option: --segmets"),
        ((), ("--segments", "none"), "--segments: found 'none'"),
        ((), ("--segments", "2", "demo2"), "found it after --"),
        ((), ("--kv", "K3V2"), "--kv: found it after --"),
        ((), ("--out", "x"), "--out: found it, needed none"),
        ((), ("--resume",), "--resume: found it, needed none"),
        ((), ("--tasks", "pl"), "--tasks: found 'pl'"),
        ((), ("--bos", "perhaps"), "--bos: found 'perhaps'"),
        ((), ("--gate", "off"), "--gate off"),
        ((), ("--dtype", "int8"), "--dtype: found 'int8'"),
        ((), ("--dtype", "float16"), "found device cpu"),
        ((), ("--vram", "much"), "--vram: found 'much'"),
        ((), ("--text", "no-such-file"), "--text no-such-file: found no such file"),
        (("--device", "cuda:0,cuda:1"), ("--gate", "only"), "needed one device"),
    ],
)
def test_what_is_refused_before_a_push(
    tmp_path: Path,
    more: tuple[str, ...],
    study: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert write(tmp_path / "k", *more, study=study) == 2
    said = capsys.readouterr().err
    assert says in said
    assert (said.count("error:"), said.count("hint:")) == (1, 1) and "Traceback" not in said
    assert not (tmp_path / "k" / "run").exists()


def test_a_pipe_cannot_be_sent_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, into = os.pipe()
    os.write(into, b"words")
    os.close(into)
    assert write(tmp_path / "k", study=("--text", f"/dev/fd/{out}")) == 2
    os.close(out)
    assert "found no regular file, needed one to send along" in capsys.readouterr().err


def test_a_local_folder_and_somebody_elses_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="found the local folder"):
        parse_model(str(tmp_path))
    (tmp_path / "precious").write_text("")
    assert write(tmp_path) == 2
    assert "found other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


WORDS = st.lists(st.text("abcxyz019", min_size=1, max_size=8), min_size=1, max_size=4)


@given(WORDS)
def test_titles_are_of_their_ids(words: list[str]) -> None:
    ident = Id.parse("me/" + "-".join(words))
    for job in ("stage-99", "rehearse", "run", "wheels"):
        title, name = ident.title(job), ident.of(job).partition("/")[2]
        assert title.replace(" ", "-") == name and 5 <= len(title) <= 50


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("demo", "demo"), ("org/Name-8x7B.v1", "hub"), ("dataset:you/weights", "dataset"),
        ("kaggle-model:a/b/c/d/12", "kaggle-model"),
    ],
)  # fmt: skip
def test_model_sources(text: str, kind: str) -> None:
    found = parse_model(text)
    assert found.kind == kind and str(found) == text
    assert parse_model(str(found)) == ModelSource(found.kind, found.reference)


# --- shards into jobs -----------------------------------------------------------------------------

FILES = st.dictionaries(
    st.sampled_from([f"model-{i:05}.safetensors" for i in range(12)]),
    st.integers(1, JOB_BYTES),
    min_size=1,
)


@given(FILES, st.integers(0, 10**7))
def test_every_shard_is_in_one_job_of_at_most_19_gb(shards: dict[str, int], small: int) -> None:
    sizes = {"config.json": 700, "tokenizer.json": small, **shards}
    jobs = share_out(sizes)
    assert sorted(name for job in jobs for name in job) == sorted(sizes)
    assert all(0 < sum(job.values()) <= JOB_BYTES == 19 * 10**9 for job in jobs)
    assert {name: size for job in jobs for name, size in job.items()} == sizes
    assert {"config.json", "tokenizer.json"} <= jobs[0].keys()
    bins = [sum(job.values()) for job in jobs]
    assert all(a + b > JOB_BYTES for i, a in enumerate(bins) for b in bins[i + 1 :])


def test_a_shard_that_no_kernel_can_keep() -> None:
    with pytest.raises(InputError, match=r"a\.safetensors: found .*, needed at most"):
        share_out({"a.safetensors": JOB_BYTES + 1})


# --- in Kaggle's layout ---------------------------------------------------------------------------


def mount_wheels(site: Kaggle, pushed: Path) -> None:
    site.mount(pushed / "wheels", "datasets", "me", "study-wheels")


@pytest.fixture(scope="module")
def undisturbed(pushed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    site = Kaggle(tmp_path_factory.mktemp("undisturbed"))
    mount_wheels(site, pushed)
    code, said = site.session(pushed / "run")
    assert code == 0, said
    assert "status complete" in said and "none is mounted; the study starts" in said
    results = json.loads((site.working / "results/results.json").read_text())
    assert results["versions"]["layersweep"] == layersweep.__version__
    assert results["versions"]["git"] is None  # the wheel's code, not the checkout's
    assert len(list((site.working / "results/sweeps").iterdir())) == SWEEPS
    assert [path.name for path in site.working.iterdir()] == ["results"]
    return site.working / "results"


def test_killed_and_resumed_from_its_own_output(
    pushed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL behind the first sweep; a second session finds its output mounted, and does the
    rest."""
    first = Kaggle(tmp_path / "first")
    mount_wheels(first, pushed)
    process = first.start(pushed / "run")
    sweeps, deadline = first.working / "results/sweeps", time.monotonic() + 120
    while not (sweeps / "0000.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = len(list(sweeps.glob("*.safetensors")))
    assert kept < SWEEPS and not (first.working / "results/results.json").exists()

    second = Kaggle(tmp_path / "second")
    mount_wheels(second, pushed)
    second.mount(first.working, "notebooks", "me", "study-run")
    code, said = second.session(pushed / "run")
    assert code == 0, said
    assert f"after {kept} finished sweep(s): {kept} of {SWEEPS} tiles" in said
    assert "status complete" in said
    assert numbers(second.working / "results") == numbers(undisturbed)


def test_a_session_without_its_gpus_ends_at_once(tmp_path: Path) -> None:
    assert run(["kaggle", str(tmp_path / "k"), "--id", "me/study"]) == 0
    site = Kaggle(tmp_path / "site")
    tools = tmp_path / "bin"
    tools.mkdir()
    for listed, found in ((0, "found 0 GPU(s), needed 2"), (1, "found 1 GPU(s), needed 2")):
        lines = "".join(f"echo 'GPU {i}: Tesla T4 (UUID: GPU-{i})'\n" for i in range(listed))
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
        (tools / "nvidia-smi").chmod(0o755)
        started = time.monotonic()
        code, said = site.session(tmp_path / "k/run", path=str(tools))
        assert code == 2 and found in said and "kaggle quota" in said
        assert time.monotonic() - started < 5
        assert not list(site.working.iterdir())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The bundled model as the repository org/tiny of a small server."""
    import huggingface_hub
    from huggingface_hub import constants

    from layersweep.checkpoint import hub as ours

    started = Hub(demo_folder())
    threading.Thread(target=started.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", started.url)
    template = started.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(ours, "HfApi", lambda: huggingface_hub.HfApi(endpoint=started.url))
    monkeypatch.setenv("HF_ENDPOINT", started.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield started
    started.shutdown()
    started.server_close()


def test_a_hub_model_is_staged_in_pieces_and_rehearsed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "JOB_BYTES", 9_000_000)
    held_out = demo_folder().parent / "text/heldout.txt"
    study = (*TINY, "--text", str(held_out))
    codec = f"{TESTS / 'own_codec.py'}:Rounded:K3V2"
    pushed = tmp_path / "k"
    assert write(pushed, "--model", "org/tiny", "--kv", codec, study=study) == 0
    stages = ["stage-1", "stage-2"]
    assert metadata(pushed / "run")["kernel_sources"] == [f"me/study-{name}" for name in stages]
    read = sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
    assert 0 < read < 500_000  # headers alone

    site = Kaggle(tmp_path / "site")
    mount_wheels(site, pushed)
    for name in stages:
        assert metadata(pushed / name)["enable_internet"] is True
        staging = Kaggle(tmp_path / name)
        code, said = staging.session(pushed / name, network=True)
        assert code == 0, said
        kept = {path.name for path in (staging.working / "model").iterdir()}
        assert kept == settings_of(pushed / name)["files"].keys()
        site.mount(staging.working, "notebooks", "me", f"study-{name}")
    assert settings_of(pushed / "stage-1")["commit"] == COMMIT

    code, said = site.session(pushed / "rehearse")
    assert code == 0, said
    assert "links to 3 shards, 1 of them in other mounts" in said
    for line in (
        "MixtralForCausalLM, 6 layers",
        "tokenized: 2 windows, 20 needles",
        "arms: exact, rounded:K3V2",
        "gate: 2 of 6 layers with their weights",
        "on t4x2: 2 x ",
        "rehearsed",
    ):
        assert line in said, line


# --- the kernel's parts ---------------------------------------------------------------------------


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /kaggle/input, for functions of the kernel in this process."""
    (tmp_path / "input").mkdir()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(kernel, "INPUT", tmp_path / "input")
    monkeypatch.setattr(kernel, "RESULTS", tmp_path / "working/results")
    monkeypatch.setattr(kernel, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(kernel, "SETTINGS", {"model": "org/tiny", "wheels": "me/study-wheels"})
    return tmp_path / "input"


def manifest(folder: Path, schema: str = kernel.MANIFEST) -> None:
    (folder / "sweeps").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"schema": schema}))
    (folder / "sweeps/0000.safetensors").write_bytes(b"numbers")
    (folder / ".lock").write_bytes(b"")


def test_a_run_on_two_devices_is_put_back_whole(mounts: Path) -> None:
    manifest(mounts / "other", schema="somebody/1")
    (mounts / "other/deep").mkdir()
    (mounts / "other/deep/manifest.json").write_text("[")
    for part in ("1-of-2", "2-of-2"):
        manifest(mounts / "notebooks/me/study-run/results/shards" / part)
    kernel.put_back()
    copied = {str(p.relative_to(kernel.RESULTS)) for p in kernel.RESULTS.rglob("*") if p.is_file()}
    assert copied == {
        f"shards/{part}/{name}"
        for part in ("1-of-2", "2-of-2")
        for name in ("manifest.json", "sweeps/0000.safetensors")
    }
    manifest(mounts / "another/results")
    with pytest.raises(SystemExit):
        kernel.put_back()


@pytest.mark.parametrize(("code", "sweeps"), [(3, 0), (1, 0), (2, 2), (1, 2), (0, 2)])
def test_a_failed_run_with_finished_sweeps_keeps_its_output(
    mounts: Path,
    code: int,
    sweeps: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("check_gpus", "install", "put_back"):
        monkeypatch.setattr(kernel, name, lambda *_: None)
    monkeypatch.setattr(kernel, "find_model", lambda: "demo")
    monkeypatch.setattr(kernel, "layersweep", lambda *_: code)
    monkeypatch.setattr(kernel, "SETTINGS", {"gpus": 0, "study": [], "again": "again"})
    for part in range(sweeps):
        manifest(kernel.RESULTS / f"shards/{part + 1}-of-2")
    if code > 1 or (code and not sweeps):
        with pytest.raises(SystemExit) as ended:
            kernel.run()
        assert ended.value.code == code
        return
    kernel.run()
    said = capsys.readouterr().out
    assert "status partial, 2 finished sweep(s)" in said and "again" in said
    assert (f"the study failed with {code}" in said) == (code != 0)


def test_other_copies_below_a_model_are_not_it(
    mounts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gpt-oss is published: original/ holds the weights in another layout."""
    monkeypatch.setattr(kernel, "SETTINGS", {"model": "dataset:me/model"})
    for place in ("m/original", "m"):
        (mounts / place).mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (mounts / place / name).write_text("{}")
    assert kernel.find_model() == str(mounts / "m")


def test_mounts_that_are_not_there(mounts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for find in (kernel.wheel_folder, kernel.find_model):
        with pytest.raises(SystemExit) as ended:
            find()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.count("error:") == said.count("hint:") == 1 and "has no file" in said
    stage = mounts / "study-stage-1/model"
    stage.mkdir(parents=True)
    (stage / "config.json").write_text("{}")
    (stage / kernel.INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(SystemExit):
        kernel.find_model()
    assert "found no x.safetensors, needed every shard" in capsys.readouterr().err
    (stage / "x.safetensors").write_bytes(b"")
    assert kernel.find_model() == str(stage)


def test_what_the_image_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel.lacking() == []
    needs = ["numpy>=99", "nosuchpackage>=1", 'fastapi>=0.115; extra == "serve"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    old, absent = kernel.lacking()
    assert old.startswith("numpy ") and old.endswith("needed numpy>=99")
    assert absent == "no nosuchpackage, needed nosuchpackage>=1"


def test_links_lead_only_where_the_user_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for path in demo_folder().iterdir():
        (links / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="a link to"):
        open_checkpoint(str(links))
    monkeypatch.setenv("LAYERSWEEP_LINKS", str(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match="a link to"):
        open_checkpoint(str(links))
    monkeypatch.setenv("LAYERSWEEP_LINKS", f"{tmp_path}:{demo_folder()}")
    whole = open_checkpoint("demo")
    assert open_checkpoint(str(links)).fingerprint == whole.fingerprint


def test_what_a_rehearsal_runs_takes_dense_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed, folder = tmp_path / "k", tmp_path / "model"
    write_synthetic(folder, small_shape("llama-3.1-8b").with_layers(4))
    study = (*TINY, "--text", str(tiny_study.text_file()))
    assert write(pushed, "--model", "dataset:me/model", study=study) == 0
    settings = settings_of(pushed / "rehearse")
    jobs = {"inspect": [], "eval": settings["rehearsal"], "plan": settings["plan"]}
    for command, arguments in jobs.items():
        there = [word.replace("{files}", str(pushed / "wheels")) for word in arguments]
        assert run([command, str(folder), *there]) == 0
    said = capsys.readouterr().out
    for line in ("tokenized: 2 windows, 20 needles", "gate: 2 of 4 layers", "on t4x2: 2 x "):
        assert line in said, line


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [("a", 1), ("ab", 2), ("aaaaab" * 4, 6), ("aaab", 4), ("a" * 20 + "b", 1), ("ba" + "c" * 9, 3)],
)
def test_a_rehearsal_reaches_every_kind_of_layer(kinds: str, layers: int) -> None:
    whole = SHAPES["llama-3.1-8b"].decoder
    layer, windows = whole.layers[0], {"a": None, "b": 128, "c": 512}
    decoder = replace(
        whole,
        layers=tuple(
            replace(layer, attention=replace(layer.attention, window=windows[kind]))
            for kind in kinds
        ),
    )
    assert reaching_every_kind(decoder) == layers


def test_a_rehearsal_refuses_what_a_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = ("eval", "demo", "--kv", "e8:K3V2", *TINY, "--device", "cpu")
    for more, says in (
        (("--rehearse", "7"), "--rehearse: found 7, needed 1 to 6 layers"),
        (("--rehearse", "2", "--out", str(tmp_path)), "a rehearsal leaves no numbers"),
        (("--rehearse", "2", "--gate", "off"), "needed the gate"),
        (("--rehearse", "2", "--prefix", "9000"), "the model's limit"),
        (("--rehearse", "2", "--kv", "K3V2@layers=6"), "needed layers from 0 to 5"),
    ):
        assert run([*study, *more]) == 2
        assert says in capsys.readouterr().err
    # layers that the whole model has, and its beginning has not
    assert run([*tiny_study.words("--kv", "lloyd:K3V2@layers=1"), "--rehearse", "1"]) == 0
