"""The one file that Kaggle runs for each of our kernels; `layersweep kaggle` fills SETTINGS in.

Kaggle uploads one code file per kernel, so this one imports nothing of layersweep and does every
job: `stage` copies shards from the hub into the kernel's output, `rehearse` tries everything that
needs no GPU, `run` is the study. Mounts have moved before, so everything is found by pattern
below /kaggle/input. LAYERSWEEP_KAGGLE_ROOT is another place of /kaggle, for tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

SETTINGS: dict[str, Any] = {}

ROOT = Path(os.environ.get("LAYERSWEEP_KAGGLE_ROOT", "/kaggle"))
INPUT, WORKING = ROOT / "input", ROOT / "working"
SCRATCH = Path(tempfile.gettempdir())  # not in WORKING, whose content is the kernel's output
SITE = SCRATCH / "layersweep-site"
RESULTS = WORKING / "results"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MANIFEST = "layersweep.manifest/1"


def main() -> None:
    {"stage": stage, "rehearse": rehearse, "run": run}[SETTINGS["job"]]()


def stop(found: str, hint: str) -> NoReturn:
    """End the kernel as layersweep ends: what was found and needed, and what to do."""
    print(f"error: {found}\nhint: {hint}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def say(line: str) -> None:
    print(f"[kaggle] {line}", flush=True)


# --- the jobs -------------------------------------------------------------------------------------


def stage() -> None:
    """Copy this kernel's files from the hub to its output, and check their sizes."""
    from huggingface_hub import hf_hub_download

    target, files = WORKING / "model", dict(SETTINGS["files"])
    total, free = sum(files.values()), shutil.disk_usage(WORKING).free
    if total > free:
        stop(f"{WORKING}: found {free} bytes free, needed {total}", "stage in a kernel of its own")
    for name, size in files.items():
        started = time.monotonic()
        path = hf_hub_download(
            SETTINGS["repository"], name, revision=SETTINGS["commit"], local_dir=target
        )
        found = os.path.getsize(path)
        if found != size:
            stop(f"{name}: found {found} bytes, needed {size}", "push this kernel again")
        say(f"{name}: {size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s")
    shutil.rmtree(target / ".cache", ignore_errors=True)
    say(f"staged {len(files)} files, {total / 1e9:.2f} GB")


def rehearse() -> None:
    """Everything that can go wrong before the first GPU second: mounts, installation, headers,
    windows and needles, two layers computed on the CPU, and the plan."""
    install()
    model = find_model()
    for command, arguments in (
        ("inspect", []),
        ("eval", study_arguments(SETTINGS["rehearsal"])),
        ("plan", study_arguments(SETTINGS["plan"])),
    ):
        if code := layersweep(command, model, *arguments):
            raise SystemExit(code)
    say("rehearsed; what needs a GPU is left. Now push `run`.")


def run() -> None:
    """The study; it resumes after the finished sweeps of an earlier version that is mounted."""
    check_gpus(int(SETTINGS["gpus"]))
    install()
    model = find_model()
    put_back()
    study = study_arguments(SETTINGS["study"])
    code = layersweep("eval", model, *study, "--out", str(RESULTS), "--resume")
    sweeps = len(list(RESULTS.rglob("sweeps/*.safetensors")))
    if code > 1 or (code and not sweeps):  # 1: the machine; others would end a second time alike
        raise SystemExit(code)
    path = RESULTS / "results.json"
    status = json.loads(path.read_text("utf-8"))["status"] if path.exists() else "partial"
    if code:
        status = "partial"
        say(
            f"the study failed with {code}, see above; this version ends as complete all the same, "
            "so that its output, with the finished sweeps, can be mounted"
        )
    say(f"status {status}, {sweeps} finished sweep(s): {RESULTS}")
    if status == "partial":
        say(f"to resume, mount this output: {SETTINGS['again']}")


def layersweep(*arguments: str) -> int:
    """The exit code of a command of layersweep; 1 where a signal ended it."""
    say("layersweep " + " ".join(arguments))
    done = subprocess.run([sys.executable, "-m", "layersweep", *arguments], env=environment())
    if done.returncode:
        say(f"`layersweep {arguments[0]}` ended with {done.returncode}")
    return done.returncode if done.returncode >= 0 else 1


def environment() -> dict[str, str]:
    """What we installed first; links of an assembled model folder may lead to the mounts."""
    paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
    changed = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "LAYERSWEEP_LINKS": str(INPUT),
    }
    if SETTINGS["offline"]:
        changed["HF_HUB_OFFLINE"] = "1"
    return os.environ | changed


def study_arguments(arguments: list[str]) -> list[str]:
    """With {files} replaced by the folder that the wheels, texts and codecs are mounted at."""
    return [argument.replace("{files}", str(wheel_folder())) for argument in arguments]


# --- the machine ----------------------------------------------------------------------------------


def check_gpus(needed: int) -> None:
    """End a session without the GPUs asked for, before anything else is spent."""
    if not needed:
        return
    driver = shutil.which("nvidia-smi")
    lines = [] if driver is None else subprocess.run(
        [driver, "-L"], stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()  # fmt: skip
    found = sum(line.startswith("GPU ") for line in lines)
    say(f"{found} GPU(s)" + "".join(f"; {line}" for line in lines))
    if found < needed:
        stop(
            f"accelerator: found {found} GPU(s), needed {needed}",
            'push with "machine_shape": "NvidiaTeslaT4" in kernel-metadata.json (it means two '
            "T4); see `kaggle quota` for what is left of this week",
        )


def install() -> None:
    """Install the wheelhouse beside the image's packages; download nothing, replace nothing."""
    folder = wheel_folder()
    names = sorted({path.name.split("-")[0] for path in folder.glob("*.whl")})
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--find-links", str(folder), "--no-deps", "--upgrade"]
    done = subprocess.run([*command, "--target", str(SITE), *names])
    if done.returncode:
        stop(f"pip: found exit code {done.returncode}, needed 0", "see what it printed above")
    sys.path.insert(0, str(SITE))
    if missing := lacking():
        stop(
            f"the image: found {'; '.join(missing)}",
            "`pip download --no-deps` a wheel for this Python and add it with --wheel FILE to "
            "`layersweep kaggle`, then `kaggle datasets version` its wheels folder",
        )
    say(f"installed {', '.join(names)} in {SITE}")


def lacking() -> list[str]:
    """The requirements of layersweep that neither the image nor the wheelhouse meets."""
    from packaging.requirements import Requirement

    missing = []
    for text in importlib.metadata.requires("layersweep") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"no {requirement.name}, needed {text}")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            missing.append(f"{requirement.name} {found}, needed {text}")
    return missing


# --- mounts ---------------------------------------------------------------------------------------


def files_below(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(here) / name for name in sorted(names))


def mounted() -> str:
    """What is mounted, for messages: the folders that hold files."""
    folders = sorted({str(path.parent.relative_to(INPUT)) for path in files_below(INPUT)})
    return f"{INPUT} has " + (", ".join(folders[:12]) or "no file")


def wheel_folder() -> Path:
    folders = {path.parent for path in files_below(INPUT) if path.match("layersweep-*.whl")}
    if len(folders) != 1:
        stop(
            f"wheels: found layersweep-*.whl in {len(folders)} folders, needed one ({mounted()})",
            f"is {SETTINGS['wheels']} created and among dataset_sources?",
        )
    return folders.pop()


def find_model() -> str:
    """`demo`, or the folder with the checkpoint; or links to it from several mounts."""
    if SETTINGS["model"] == "demo":
        return "demo"
    files = list(files_below(INPUT))
    weights = {path.parent for path in files if path.name == INDEX or path.suffix == ".safetensors"}
    found = {path.parent for path in files if path.name == "config.json"} & weights
    # publishers put other copies of their weights below: original/, metal/
    folders = [folder for folder in found if not found.intersection(folder.parents)]
    if len(folders) != 1:
        stop(
            f"model: found {len(folders)} folders with config.json and weights, needed one "
            f"({mounted()})",
            f"are all stage kernels complete? The mounts of {SETTINGS['model']} are in "
            "kernel-metadata.json",
        )
    return str(assemble(folders[0], files))


def assemble(folder: Path, files: list[Path]) -> Path:
    """`folder` if it is complete, else a folder of links to it and to the shards elsewhere."""
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return folder
    shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    elsewhere = [name for name in shards if not (folder / name).exists()]
    places = {path.name: path for path in files}
    if absent := [name for name in elsewhere if name not in places]:
        stop(
            f"model: found no {', '.join(absent)}, needed every shard of {index} ({mounted()})",
            "are all stage kernels complete, and among kernel_sources?",
        )
    if not elsewhere:
        return folder
    links = SCRATCH / "layersweep-model"
    links.mkdir()
    for path in [*folder.iterdir(), *(places[name] for name in elsewhere)]:
        (links / path.name).symlink_to(path)
    say(f"{links}: links to {len(shards)} shards, {len(elsewhere)} of them in other mounts")
    return links


def put_back() -> None:
    """Copy an earlier run's folder to RESULTS, so that the study resumes from it. A link would be
    read-only, as mounts are; so would a copied tree, whose modes are copied too."""
    folders = {run_folder(path) for path in files_below(INPUT) if is_manifest(path)}
    if len(folders) > 1:
        stop(
            f"earlier runs: found {', '.join(map(str, sorted(folders)))}, needed at most one",
            "mount only the output of the run to resume",
        )
    for earlier in folders:
        names = [path for path in files_below(earlier) if not path.name.startswith(".")]
        for path in names:
            copy = RESULTS / path.relative_to(earlier)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        say(f"earlier run: {len(names)} files copied from {earlier}")
    if not folders:
        say("earlier run: none is mounted; the study starts")


def is_manifest(path: Path) -> bool:
    if path.name != "manifest.json":
        return False
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("schema") == MANIFEST


def run_folder(manifest: Path) -> Path:
    """Of a run on several devices, whose parts are in shards/1-of-2 and so on, the folder above."""
    folder = manifest.parent
    return folder.parents[1] if folder.parent.name == "shards" else folder


if __name__ == "__main__":
    main()
