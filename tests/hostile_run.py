"""Meets hostile checkpoints with the command line, in forks of a process that has it imported.

    python tests/hostile_run.py [NAME ...]     one JSON line per command, and a summary

What is measured is the command, not the imports. Torch is kept from starting threads, which a
fork would lose and then wait for.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hostile_checkpoints import CASES, build
from hostile_damages import EXECUTED, TEXT, base

SECONDS, GROWTH_MB = 2.0, 500.0  # the limits that every refusal must keep
LONGEST_LINE = 2000
KILLED_AFTER_S = 30  # a command that never ends must not stop the run
ADDRESSES = 16 * 2**30  # nor may one fill the machine's memory
Command = tuple[str, ...]
INSPECT = ("inspect", "{folder}")
GATE = ("eval", "{folder}", "--gate", "only", "--text", "{text}", "--device", "cpu")
NEEDLES = (
    *("eval", "{folder}", "--kv", "K3V2", "--tasks", "niah", "--niah-context", "1024"),
    *("--niah-per-depth", "1", "--niah-depths", "0.5", "--text", "{text}", "--device", "cpu"),
)
ACCEPTED = (INSPECT, GATE, NEEDLES)
COMMANDS: dict[str, tuple[Command, ...]] = {
    "headers": (INSPECT, GATE),
    "values": (GATE,),
    "tokenizer": (GATE,),
    "chat": (NEEDLES,),
}


@dataclass(frozen=True)
class Met:
    """One command on one case: exit code (negative: killed by that signal), what it said, its
    processor seconds (its children's included) and its peak of resident memory above the fork's
    start."""

    case: str
    command: str
    code: int
    out: str
    err: str
    seconds: float
    growth_mb: float
    executed: bool


def faults(met: Met) -> list[str]:
    """What is wrong with a refusal; empty where it is as it should be."""
    lines = met.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    said = errors + [line for line in met.out.splitlines() if line.startswith("problem: ")]
    found = []
    if met.code != 2:
        found.append(f"exit code {met.code}")
    if len(errors) != 1 or len(hints) > 1 or "Traceback" in met.err:
        found.append(f"{len(errors)} error lines, {len(hints)} hint lines")
    if not any(all(words in line for words in CASES[met.case].says) for line in said):
        found.append(f"no line with {CASES[met.case].says}")
    if not any("found" in line and "needed" in line for line in errors):
        found.append("no word of what was found and needed")
    if max(map(len, said), default=0) > LONGEST_LINE:
        found.append(f"a line of {max(map(len, said))} characters")
    if not 0 <= met.seconds < SECONDS:
        found.append(f"{met.seconds} s")
    if not 0 <= met.growth_mb < GROWTH_MB:
        found.append(f"{met.growth_mb} MB")
    if met.executed:
        found.append("its code was executed")
    return found


def meet_all(names: Sequence[str], folder: Path) -> Iterator[Met]:
    """Every command on every case; `folder` is filled and emptied. The valid checkpoints come
    first, as the case "": they must be accepted."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    _import_everything(text)
    for sound in (base(1), base(2), base(1, "fused")):
        yield from _in_forks([Job("", command, sound) for command in ACCEPTED], text)
    jobs = [Job(name, command, folder / name)
            for name in names for command in COMMANDS[CASES[name].seen]]  # fmt: skip
    workers = os.cpu_count() or 1
    shares = [[job for job in jobs if names.index(job.case) % workers == n] for n in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for several in pool.map(lambda share: list(_in_forks(share, text)), shares):
            yield from several


@dataclass(frozen=True)
class Job:
    case: str
    command: Command
    folder: Path


def _in_forks(jobs: Sequence[Job], text: Path) -> Iterator[Met]:
    """A fork does the jobs one after the other; where it dies in one, another does the rest."""
    while jobs:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                _do(jobs, text, writer)
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, encoding="utf-8") as lines:
            done = [Met(**json.loads(line)) for line in lines]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield from done
        if len(done) < len(jobs):
            lost = jobs[len(done)]
            yield Met(lost.case, lost.command[0], status, "", "", math.inf, math.inf, False)
        jobs = jobs[len(done) + 1 :]


def _do(jobs: Sequence[Job], text: Path, pipe: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    torch.set_num_threads(1)  # renews torch's pool, which two threads of a fork would race to do
    start_mb = _memory_mb("VmRSS")
    with open(pipe, "w", encoding="utf-8") as lines:
        for job in jobs:
            if not job.folder.exists():
                build(job.case, job.folder)
            arguments = [word.format(folder=job.folder, text=text) for word in job.command]
            found = _run(arguments, start_mb)
            executed = (job.folder / EXECUTED).exists()
            met = Met(job.case, job.command[0], executed=executed, **found)
            lines.write(json.dumps(asdict(met)) + "\n")
            lines.flush()


def _run(arguments: list[str], start_mb: float) -> dict[str, Any]:
    from layersweep.cli.app import run

    signal.alarm(KILLED_AFTER_S)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    spent, out, err = _processor_s(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(arguments)
        except BaseException:  # what a person would see as a traceback
            traceback.print_exc()
            code = 1
    seconds, growth_mb = _processor_s() - spent, _memory_mb("VmHWM") - start_mb
    said = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    return said | {"seconds": round(seconds, 3), "growth_mb": round(growth_mb, 1)}


def _processor_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 2**10


def _import_everything(text: Path) -> None:
    """A whole evaluation, so that a fork finds imported what commands import on their way."""
    from layersweep.cli.app import run

    arguments = [word.format(folder=base(1), text=text) for word in GATE]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert run(arguments) == 0


def main() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    names = sys.argv[1:] or list(CASES)
    started, refused, worst = time.monotonic(), set(names), {"seconds": 0.0, "growth_mb": 0.0}
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        for met in meet_all(names, Path(folder)):
            print(json.dumps(asdict(met)), flush=True)
            if met.case and faults(met):
                refused.discard(met.case)
            for key in worst:
                worst[key] = max(worst[key], getattr(met, key))
    summary = {"corpus": len(names), "refused": len(refused)}
    print(json.dumps(summary | worst | {"wall_s": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
