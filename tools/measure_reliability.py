"""Measure what docs/reliability.md says, and print its table.

    python tools/measure_reliability.py --measure [--kills 25] [--fuzz-seconds 600]
    python tools/measure_reliability.py          the table, from what was measured last

Measuring runs the tools named in the table one after another and writes their JSON lines to
docs/measurements/reliability.jsonl. It takes half an hour on two cores. Lines of another device
stay: `tools/kill_and_resume.py` measures kills on a GPU, and its line is added by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINES = ROOT / "docs/measurements/reliability.jsonl"
Json = dict[str, Any]


def lines_of(*command: str) -> list[Json]:
    """The JSON lines that a tool prints."""
    print("running", *command, file=sys.stderr)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not found:
        raise SystemExit(f"{command[0]} ended with {done.returncode} and no line of JSON")
    return found


def injected_faults() -> Json:
    """tests/test_limits.py, every test a fault."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_limits.py"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, stdout=sys.stderr)
        cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if len(case)]
    return {"reliability": "faults", "injected": len(cases), "survived": len(cases) - len(failed)}


def measure(kills: int, seconds: int) -> Iterator[Json]:
    yield from lines_of("tools/kill_and_resume.py", "--kills", str(kills))
    yield injected_faults()
    yield lines_of("tests/hostile_run.py")[-1]
    yield from lines_of("tests/fuzz_checkpoint.py", "--seconds", str(seconds))
    planted = lines_of("tools/plant_faults.py")
    yield {"reliability": "gate", "planted": len(planted)} | {
        kind: sum(line[kind][0] != 0 for line in planted) for kind in ("with_card", "without_card")
    }
    yield from lines_of("tools/measure_coverage.py")
    yield from lines_of("tools/measure_tests.py")


def table(lines: list[Json]) -> str:
    """The Markdown table of docs/reliability.md."""
    rows = [("what was done", "outcome", "by")]
    for line in lines:
        rows += [row for row in (_row(line),) if row]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---|---|---|", *body])


def _row(line: Json) -> tuple[str, str, str] | None:
    match line:
        case {"reliability": "kills"}:
            fell = ", ".join(f"{count} {where}" for where, count in line["fell"].items())
            return (
                f"SIGKILL {line['kills']} times in {line['runs']} runs of {line['sweeps']} sweeps, "
                f"{line['device']}, {line['dtype']} ({fell})",
                f"{line['equal']} of {line['runs']} runs equal an undisturbed run bit for bit",
                "`tools/kill_and_resume.py`",
            )
        case {"reliability": "faults"}:
            return (
                f"{line['injected']} faults of memory, disk and files",
                f"{line['survived']} handled as stated, no finished work lost",
                "`pytest tests/test_limits.py`",
            )
        case {"corpus": count}:
            return (
                f"{count} hostile or damaged checkpoints",
                f"{line['refused']} refused with file and tensor named, exit code 2; at most "
                f"{line['seconds']:.1f} s and {line['growth_mb']:.0f} MB each",
                "`tests/hostile_run.py`",
            )
        case {"fuzz": _}:
            return (
                f"fuzzed headers, index, config and quant_state: {line['executions']:,} executions",
                f"{line['findings']} findings",
                f"`tests/fuzz_checkpoint.py --seconds {line['seconds']:.0f}`",
            )
        case {"reliability": "gate"}:
            return (
                f"{line['planted']} faults planted in the bundled model",
                f"{line['with_card']} refused; without the model's card, {line['without_card']}",
                "`tools/plant_faults.py`",
            )
        case {"coverage": name}:
            return (
                f"{line['studies']:,} simulated studies of {line['n']} windows, {name}, "
                f"{line['groups']} {line['grouping']}",
                f"the 95 % interval covered the true value in {100 * line['share']:.1f} %",
                "`tools/measure_coverage.py`",
            )
        case {"false_positives": rates}:
            found = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in rates.items())
            what = "needles" if line["grouping"] == "stretches" else "windows"
            return (
                f"{line['studies']:,} simulated studies of {line['n']} {what} without a "
                f"difference, {line['grouping']}, rho={line['rho']:.1f}",
                f"p fell to 5 % in: {found}",
                "`tools/measure_tests.py`",
            )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--fuzz-seconds", type=int, default=600)
    given = parser.parse_args()
    lines = [json.loads(line) for line in LINES.read_text("utf-8").splitlines()]
    if given.measure:
        elsewhere = [line for line in lines if line.get("dtype") == "float16"]
        measured = list(measure(given.kills, given.fuzz_seconds))
        lines = [*measured[:1], *elsewhere, *measured[1:]]
        LINES.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    print(table(lines))


if __name__ == "__main__":
    main()
