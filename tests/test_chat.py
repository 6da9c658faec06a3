"""The process that renders chat templates: found wherever the library is, its failures named."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import jinja2
import markupsafe
import pytest

import layersweep
from layersweep.errors import MachineError
from layersweep.text import chat

TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"
HELLO = [chat.Message("user", "hello")]


def test_a_library_that_is_only_on_sys_path_renders(tmp_path: Path) -> None:
    """As a script or a notebook has it after sys.path.insert; -S hides what is installed."""
    for package in (layersweep, jinja2, markupsafe):
        (tmp_path / package.__name__).symlink_to(Path(package.__path__[0]))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.executable = {str(bare)!r}\n"
        "from layersweep.text.chat import Message, render_chat\n"
        f"print(render_chat({TEMPLATE!r}, [Message('user', 'hello')], {{'bos_token': '<s>'}}))"
    )
    done = subprocess.run([bare, "-I", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("<s>hello\n", "")


def test_a_module_in_the_current_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('the checkpoint ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` has it
    assert chat.render_chat(TEMPLATE, HELLO, {"bos_token": "<s>"}) == "<s>hello"


def test_a_process_that_cannot_start_is_not_the_templates_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "_START", "import a_module_that_is_not_there")
    with pytest.raises(MachineError, match="No module named 'a_module_that_is_not_there'") as found:
        chat.render_chat(TEMPLATE, HELLO, {})
    assert "chat_template" not in found.value.hint


def test_a_process_that_the_system_kills_is_not_the_templates_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "_START", f"import os; os.kill(os.getpid(), {signal.SIGKILL})")
    with pytest.raises(MachineError, match="found it killed by SIGKILL") as found:
        chat.render_chat(TEMPLATE, HELLO, {})
    assert "memory" in found.value.hint


def test_limits_that_are_lower_already_are_kept() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n"
        "from layersweep.text.chat import Message, render_chat\n"
        f"print(render_chat({TEMPLATE!r}, [Message('user', 'hello')], {{'bos_token': '<s>'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("<s>hello\n", "")
