"""Kill evaluations at random moments, resume them, and compare with one that was left alone.

    python tools/kill_and_resume.py [--kills 25] [--seed N] [-- MODEL and options of `eval`]

Every trial is a run of its own. It is killed (SIGKILL) at a moment drawn from the whole length of
an undisturbed run, from its start to after its end, and so are its resumptions, until one comes
through: at most 3 kills a trial. Prints one JSON line: kills by where they fell, trials, and those
whose results.json has the numbers of the undisturbed run (everything but created, command,
performance, where weights waited, and the measured peak in the gate).
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
    count = len(list((folder / "sweeps").glob("*.safetensors")))
    return f"behind {count} sweeps"


def trial(arguments: list[str], folder: Path, length: float, dice: random.Random) -> list[str]:
    """Run, kill and resume until it is through; where the kills fell."""
    fell: list[str] = []
    while True:
        words = command(arguments, folder)
        if (folder / "manifest.json").exists():
            words.append("--resume")
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            limit = dice.uniform(0, 1.05 * length) if len(fell) < MOST_KILLS else None
            _, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            fell.append(where(folder))
            continue
        if process.returncode:
            raise SystemExit(f"a run ended with {process.returncode}:\n{said.decode()}")
        return fell


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
        started = time.perf_counter()
        subprocess.run(command(given.arguments, undisturbed), check=True, stdout=subprocess.DEVNULL)
        length = time.perf_counter() - started
        wanted = numbers(undisturbed)
        sweeps = len(list((undisturbed / "sweeps").glob("*.safetensors")))
        while fell.total() < given.kills:
            folder = Path(name) / f"trial-{trials}"
            fell.update(trial(given.arguments, folder, length, dice))
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
            "sweeps": sweeps,
            "run_s": round(length, 1),
            "seconds": round(time.perf_counter() - begun),
            "seed": given.seed,
        })
    )  # fmt: skip
    sys.exit(equal != trials)


if __name__ == "__main__":
    main()
