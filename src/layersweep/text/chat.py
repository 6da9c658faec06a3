"""A checkpoint's chat template, rendered in a process of its own with little time and memory.

A template is a program from a stranger. Jinja's sandbox keeps it from Python and from files, but
not from loops without end or strings without bound.

    {"path", "template", "messages", "tokens"} --> python -c _START --> [text, error], in JSON
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layersweep.errors import InputError, MachineError

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

SECONDS = 1  # of the processor; published templates need a thousandth
MEMORY = 512 * 2**20  # of addresses: Python with Jinja has 40 MB
TOO_MUCH = 3  # exit code of a process that ran out of memory
LONGEST = 2**20  # characters beside the messages' own; published templates add a few hundred
PATIENCE = 30.0  # seconds by the clock, on a machine that does other things

# The process finds modules where this one does, also where only a script's sys.path.insert says so.
_START = """
import json, sys
given = json.load(sys.stdin)
sys.path[:] = given.pop("path")
from layersweep.text.chat import main
main(**given)
"""


@dataclass(frozen=True)
class Message:
    """What one side of a chat said. `role`: system, user or assistant, or a template's own."""

    role: str
    content: str


def render_chat(template: str, messages: Sequence[Message], tokens: Mapping[str, str]) -> str:
    """Messages through the template, up to where the next answer starts.

    `tokens`: what the template may call bos_token, eos_token and so on. Raises InputError where
    the template fails, refuses the messages or takes too much, MachineError where the process that
    renders it fails.
    """
    given = {
        "path": _module_path(),
        "template": template,
        "messages": [asdict(message) for message in messages],
        "tokens": {**tokens},
    }
    # -P: nothing of the current folder, perhaps the checkpoint's, is imported
    command = [sys.executable, "-P", "-c", _START]
    try:
        done = subprocess.run(
            command, input=json.dumps(given).encode(), capture_output=True, timeout=PATIENCE,
            process_group=0,  # Ctrl-C in the terminal is for this process
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        raise _no_process(f"it unfinished after {PATIENCE:.0f} s") from late
    if done.returncode in (TOO_MUCH, -signal.SIGXCPU):
        text, error = "", f"it took more than {SECONDS} s or {MEMORY >> 20} MiB"
    elif done.returncode < 0:
        raise _no_process(f"it killed by {signal.Signals(-done.returncode).name}")
    elif done.returncode:
        raise _no_process(done.stderr.decode(errors="replace").strip()[-300:])
    else:
        text, error = json.loads(done.stdout)
    if error:
        raise InputError(
            f"chat template: found an error ({error}), needed the messages rendered",
            hint="templates may want user and assistant in turn, or no system message; else repair "
            "chat_template in tokenizer_config.json, or remove it",
        )
    return text


def _module_path() -> list[str]:
    """sys.path without the current folder, and with the folder that this package lies in."""
    here = Path.cwd()
    own = str(Path(__file__).resolve().parents[2])
    return [*(place for place in sys.path if place and Path(place).resolve() != here), own]


def _no_process(found: str) -> MachineError:
    return MachineError(
        f"the process that renders the chat template: found {found}, needed it to end",
        hint="check that `python -c 'import jinja2'` works and that memory is free, then try again",
    )


def _sandbox() -> SandboxedEnvironment:
    """What transformers gives a template, except for today's date."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks what an assistant says, for training; here it says nothing."""

        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        # a prompt must not change with the day it is run on
        return datetime(2024, 7, 26).strftime(pattern)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes what has a meaning in HTML
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    sandbox.filters["tojson"] = tojson
    return sandbox


def _render_in(
    sandbox: SandboxedEnvironment,
    template: str,
    messages: Sequence[Mapping[str, str]],
    tokens: Mapping[str, str],
) -> str:
    from jinja2 import TemplateError

    # templates ask whether tools are none, which what is not defined is not
    text = sandbox.from_string(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
    )
    most = LONGEST + sum(len(message["content"]) for message in messages)
    if len(text) > most:
        raise TemplateError(f"{len(text)} characters, at most {most} are rendered")
    return text


def main(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str]) -> None:
    """The process of its own: modules and limits first, then the template.

    What fails before the template is no fault of it, and ends the process with an exit code.
    """
    import resource

    def limit(kind: int, soft: int, hard: int) -> None:
        most = resource.getrlimit(kind)[1]  # may be lowered, never raised
        hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(kind, (min(soft, hard), hard))

    sandbox = _sandbox()
    limit(resource.RLIMIT_CORE, 0, 0)
    limit(resource.RLIMIT_AS, MEMORY, MEMORY)
    # the soft limit ends a process by SIGXCPU, which nobody else sends; the hard one by SIGKILL
    limit(resource.RLIMIT_CPU, SECONDS, SECONDS + 1)
    text = error = ""
    try:
        text = _render_in(sandbox, template, messages, tokens)
    except MemoryError:
        sys.exit(TOO_MUCH)
    except Exception as failure:  # whatever a template makes Jinja or Python raise
        error = f"{failure}"[:300] or type(failure).__name__
    json.dump([text, error], sys.stdout)
