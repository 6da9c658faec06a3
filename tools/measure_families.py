"""Every causal language model of the installed transformers, tiny and random, through layersweep.

    python tools/measure_families.py [NAME ...]      a JSON line per model; some minutes for all
    python tools/measure_families.py --table FILE    those lines as the tables of docs/models.md

NAME is a model type, or a variant of tests/families/table.py (`llama:yarn`); without one, all
variants and all other model types. A line says on which path layersweep runs the model, with the
largest differences from transformers' losses (float32, CPU), or why it is refused. Where
transformers itself makes no tiny model of a type, `untried` says why.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from families import checks, ours
from families.oracle import weigh
from families.small import Tiny
from families.table import EXPERTS, HYBRIDS, TINY
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import set_verbosity_error

from layersweep.errors import InputError

MOST = 5_000_000  # parameters: more is a type that small.SMALL does not make small
EXACT = ("prefill", "streaming", "needle")
COLUMNS = ("prefill", "nf4", "study", "streaming", "needle", "generate")
ARM = "lloyd:K3V2"
# what a strange model raises, in transformers or in layersweep
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, StrictDataclassError),
)
# transformers' own cache holds keys of several bases there, and differs from its forward pass
GROWING = {"llama:dynamic"}


def measure(name: str) -> dict[str, object]:
    """One line."""
    tiny = TINY.get(name) or Tiny(name)
    line: dict[str, object] = {"model": name, "model_type": tiny.model_type}
    with tempfile.TemporaryDirectory() as folder:
        try:
            parameters = weigh(tiny)
            if parameters > MOST:
                return line | {"untried": f"{parameters:,} parameters at its smallest"}
            subject = checks.Subject.of(tiny, Path(folder))
        except FAILURES as error:
            return line | {"untried": _short(error)}
        return line | _measured(
            subject, experts=name in EXPERTS or name in HYBRIDS, cached=name not in GROWING
        )


def _measured(subject: checks.Subject, *, experts: bool, cached: bool) -> dict[str, object]:
    try:
        model = ours.opened(subject.folder)
    except InputError as error:
        return {"refused": _short(error)}
    except FAILURES as error:
        return {"crashed": _short(error)}
    found: dict[str, object] = {"path": getattr(model.paths, "model", "own")}
    asked = {"exact": lambda: vars(checks.exact(subject))}
    if cached:
        asked["study"] = lambda: {"study": checks.through_arm(subject, ARM)[0]}
        asked["generate"] = lambda: {"generate": checks.generated(subject)}
    if experts:
        asked["nf4"] = lambda: {"nf4": checks.nf4(subject)}
    asked["fields"] = lambda: _fields(subject)
    for what, ask in asked.items():
        try:
            found |= ask()
        except FAILURES as error:
            found |= {f"{what}_failed": _short(error)}
    return found


def _fields(subject: checks.Subject) -> dict[str, object]:
    """How many changed fields moved as transformers', which were refused, which were wrong."""
    every = list(checks.changed(subject))
    return {
        "fields_equal": sum(one.equal for one in every),
        "fields_refused": [one.field for one in every if one.refused],
        "fields_wrong": [c for one in every if (c := one.complaint(subject.tiny))],
    }


def _short(error: BaseException) -> str:
    words = re.sub(r"\S*config\.json: ", "", str(error).strip())  # of a temporary folder
    return (words or type(error).__name__).replace("\n", " ")[:300]


def names() -> Iterator[str]:
    yield from TINY
    known = {tiny.model_type for tiny in TINY.values()}
    yield from (name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in known)


def table(lines: list[dict[str, object]]) -> str:
    """Markdown: what runs, what is refused, and what was not tried."""
    rows = [
        "| model | path | float32 | NF4 | study | streaming | needle | generate | fields changed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "path" not in line:
            continue
        marks = [_mark(line, key) for key in COLUMNS]
        changed = f"{line.get('fields_equal', 0)}"
        if refused := line.get("fields_refused"):
            changed += f", refused: {', '.join(f'`{field}`' for field in refused)}"
        rows.append(f"| `{line['model']}` | {line['path']} | {' | '.join(marks)} | {changed} |")
    refused = {str(line["model"]): _reason(line) for line in lines if "refused" in line}
    if refused:
        rows += ["", "| refused | reason |", "|---|---|"]
        rows += [f"| `{name}` | {reason} |" for name, reason in refused.items()]
    untried = [f"`{line['model']}`" for line in lines if "untried" in line or "crashed" in line]
    if untried:
        rows += [
            "",
            f"Not tried, since no tiny model of the type can be made: {', '.join(untried)}.",
        ]
    return "\n".join(rows)


def _reason(line: dict[str, object]) -> str:
    return re.sub(r"^found model_type '[^']*', where ", "", str(line["refused"]))


def _mark(line: dict[str, object], key: str) -> str:
    value = line.get(key)
    if not isinstance(value, float):
        return "no" if f"{'exact' if key in EXACT else key}_failed" in line else ""
    return f"{value:.0e}" if value < checks.TOLERANCE else f"**{value:.0e}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--table", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    set_verbosity_error()
    torch.set_num_threads(1)
    for name in arguments.names or names():
        start = time.monotonic()
        line = measure(name)
        print(json.dumps(line | {"seconds": round(time.monotonic() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
