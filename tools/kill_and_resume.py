"""Kill evaluations at random moments, resume them, and compare with one that was left alone.

    python tools/kill_and_resume.py [--kills 25] [--seed N] [-- MODEL and options of `eval`]

Every trial is a run of its own. SIGKILL ends it and its resumptions, at most 3 times a trial; then
one is left to finish. A moment is drawn in two steps, since a run may be mostly start: after which
sweep, then how long after it, up to the time that a sweep takes. Prints one JSON line: kills by
where they fell, trials, and the trials whose results.json has the numbers of an undisturbed run
(everything but created, command, performance, where weights waited, and the measured peak in the
gate).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARGUMENTS = [
    "demo", "--kv", "K3V2,K4V2", "--segments", "60", "--prefix", "256", "--continuation", "128",
    "--niah-context", "768", "--niah-per-depth", "3", "--vram", "430MiB",
]  # fmt: skip
MOST_KILLS = 3  # of a trial


def command(arguments: list[str], folder: Path) -> list[str]:
    return [sys.executable, "-m", "layersweep", "eval", *arguments, "--out", str(folder)]


def numbers(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    for name in ("created", "command", "performance"):
        del results[name]
    del results["paths"]["host"]
    if results["gate"]:
        results["gate"]["checks"] = [
            check for check in results["gate"]["checks"] if check["name"] != "peak within plan"
        ]
    return results


def where(folder: Path) -> str:
    """Where a kill fell, by what it left."""
    if (folder / "results.json").exists():
        return "after the results"
    if not (folder / "manifest.json").exists():
        return "before the first sweep"
    count = finished(folder)
    return f"with {count} sweep{'' if count == 1 else 's'} finished"


def finished(folder: Path) -> int:
    return len(list((folder / "sweeps").glob("*.safetensors")))


def trial(arguments: list[str], folder: Path, lone: Lone, dice: random.Random) -> list[str]:
    """Run, kill and resume until it is through; where the kills fell."""
    fell: list[str] = []
    while True:
        words = command(arguments, folder)
        if (folder / "manifest.json").exists():
            words.append("--resume")
        after = dice.randint(finished(folder), lone.sweeps)
        wait = dice.uniform(0, lone.sweep_s)
        if after == finished(folder):  # from the start of the process on
            wait += dice.uniform(0, lone.begin_s)
        with subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            while process.poll() is None and finished(folder) < after:
                time.sleep(0.002)
            try:
                limit = wait if len(fell) < MOST_KILLS else None
                _, said = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                fell.append(where(folder))
                continue
        if process.returncode:
            raise SystemExit(f"a run ended with {process.returncode}:\n{said}")
        return fell


@dataclass(frozen=True)
class Lone:
    """The undisturbed run: seconds until its folder is begun, of a sweep, and of all of it."""

    begin_s: float
    sweep_s: float
    seconds: float
    sweeps: int


def lone_run(words: list[str], folder: Path) -> Lone:
    started, begin, ends = time.perf_counter(), 0.0, [0.0]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            now = time.perf_counter() - started
            if not begin and (folder / "manifest.json").exists():
                begin = now
            if finished(folder) >= len(ends):
                ends.append(now)
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"the undisturbed run ended with {process.returncode}")
    sweeps = len(ends) - 1
    sweep_s = (ends[-1] - ends[1]) / (sweeps - 1) if sweeps > 1 else ends[-1] - begin
    return Lone(begin, sweep_s, time.perf_counter() - started, sweeps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=25, help="at least so many")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("arguments", nargs="*", default=ARGUMENTS, help="of layersweep eval")
    given = parser.parse_args()
    dice, fell, trials, equal = random.Random(given.seed), Counter[str](), 0, 0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        undisturbed = Path(name) / "undisturbed"
        lone = lone_run(command(given.arguments, undisturbed), undisturbed)
        wanted = numbers(undisturbed)
        while fell.total() < given.kills:
            folder = Path(name) / f"trial-{trials}"
            fell.update(trial(given.arguments, folder, lone, dice))
            trials += 1
            equal += numbers(folder) == wanted
            print(f"{fell.total()} kills, {equal} of {trials} runs equal", file=sys.stderr)
        results = json.loads((undisturbed / "results.json").read_text("utf-8"))
    print(
        json.dumps({
            "reliability": "kills",
            "device": results["device"]["name"],
            "dtype": results["protocol"]["dtype"],
            "kills": fell.total(),
            "fell": dict(sorted(fell.items())),
            "runs": trials,
            "equal": equal,
            "sweeps": lone.sweeps,
            "run_s": round(lone.seconds, 1),
            "seconds": round(time.perf_counter() - begun),
            "seed": given.seed,
        })
    )  # fmt: skip
    sys.exit(equal != trials)


if __name__ == "__main__":
    main()
