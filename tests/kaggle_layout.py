"""A local copy of what a kernel sees on Kaggle: /kaggle/input read-only, /kaggle/working, 30 GB of
memory, no network. Where the machine does not allow namespaces, sockets are refused instead."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MEMORY = 30 * 10**9
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
NO_SOCKETS = """
import socket
def refuse(*_): raise OSError("no network in this session")
socket.socket.connect = socket.socket.connect_ex = refuse
"""


class Kaggle:
    """Mounts, and sessions that run a pushed folder's script in them."""

    def __init__(self, root: Path) -> None:
        self.root, self.input, self.working = root, root / "input", root / "working"
        self.input.mkdir(parents=True)

    def mount(self, folder: Path, *place: str) -> Path:
        """A copy of `folder`, in which nothing can be written, below input."""
        target = self.input.joinpath(*place)
        shutil.copytree(folder, target)
        for path in [*target.rglob("*"), target]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        return target

    def start(
        self, kernel: Path, *, network: bool = False, path: str = ""
    ) -> subprocess.Popen[str]:
        """A fresh session in a process group of its own. `path`: folders before PATH's."""
        scratch = self.root / "tmp"
        for folder in (self.working, scratch):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        environment = {
            "PATH": os.pathsep.join(filter(None, [path, os.environ["PATH"]])),
            "HOME": str(scratch), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1",
            "LAYERSWEEP_KAGGLE_ROOT": str(self.root),
        }  # fmt: skip
        command = [sys.executable, str(kernel / "kernel.py")]
        if not network and can_unshare():
            command = ["unshare", "-rnm", "sh", "-c", READ_ONLY, str(self.input), *command]
        elif not network:
            (self.root / "sitecustomize.py").write_text(NO_SOCKETS)
            environment["PYTHONPATH"] = str(self.root)
        else:
            environment |= {k: v for k, v in os.environ.items() if k.startswith("HF_")}
        return subprocess.Popen(
            command, cwd=self.working, env=environment, text=True, preexec_fn=limited(MEMORY),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def session(
        self, kernel: Path, *, network: bool = False, path: str = "", timeout: float = 300
    ) -> tuple[int, str]:
        """Exit code and all output of a whole session."""
        with self.start(kernel, network=network, path=path) as process:
            said, _ = process.communicate(timeout=timeout)
        return process.returncode, said


def limited(limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@functools.cache
def can_unshare() -> bool:
    """Whether a namespace with its own mounts and without network can be had."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rnm", "mount", "--bind", "/tmp", "/tmp"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
