"""A checkpoint's chat template, rendered in a process of its own with little time and memory.

A template is a program from a stranger. Jinja's sandbox keeps it from Python and from files, but
not from loops without end or strings without bound.

    {"template", "message", "tokens"} --> python -m layersweep.text.chat --> [text, error], in JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

from layersweep.errors import InputError

SECONDS = 1  # of the processor; published templates need a thousandth
MEMORY = 512 * 2**20  # of addresses: Python with Jinja has 40 MB
TOO_MUCH = 3  # exit code of a process that ran out of memory
LONGEST = 2**20  # characters; published templates add a few hundred
PATIENCE = 30.0  # seconds by the clock, on a machine that does other things


def render(template: str, message: str, tokens: Mapping[str, str]) -> str:
    """One user message through the template, up to where the answer starts.

    Raises InputError where the template fails or takes too much. `tokens`: what it may call
    bos_token, eos_token and so on.
    """
    content = json.dumps({"template": template, "message": message, "tokens": dict(tokens)})
    # -P: a jinja2.py in the current folder, perhaps the checkpoint's, is not imported
    command = [sys.executable, "-P", "-m", "layersweep.text.chat"]
    try:
        done = subprocess.run(
            command, input=content.encode(), capture_output=True, timeout=PATIENCE
        )
        code = done.returncode
    except subprocess.TimeoutExpired:
        code = TOO_MUCH
    text = ""
    if code == 0:
        text, error = json.loads(done.stdout)
    elif code < 0 or code == TOO_MUCH:  # below 0: killed
        error = f"it took more than {SECONDS} s or {MEMORY >> 20} MiB"
    else:
        error = done.stderr.decode(errors="replace").strip()[-300:]
    if error:
        raise InputError(
            f"chat template: found an error ({error}), needed one user message rendered",
            hint="repair chat_template in tokenizer_config.json, or remove it",
        )
    return text


def _render_here(template: str, message: str, tokens: Mapping[str, str]) -> str:
    """The template in Jinja's sandbox, with the settings that published templates rely on."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        # a prompt must not change with the day it is run on
        return datetime(2024, 7, 26).strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    messages = [{"role": "user", "content": message}]
    text = environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, **tokens
    )
    if len(text) > LONGEST:
        raise TemplateError(f"{len(text)} characters, at most {LONGEST} are rendered")
    return text


def main() -> None:
    """The process of its own: limits first, then the template."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    given = json.load(sys.stdin)
    text = error = ""
    try:
        text = _render_here(given["template"], given["message"], given["tokens"])
    except MemoryError:
        sys.exit(TOO_MUCH)
    except Exception as failure:  # whatever a template makes Jinja or Python raise
        error = f"{failure}"[:300] or type(failure).__name__
    json.dump([text, error], sys.stdout)


if __name__ == "__main__":
    main()
