"""What `layersweep lm-eval` prints when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from layersweep.integrations.lm_eval.compare import PER_UNIT, PERPLEXITY
from layersweep.report.table import print_whole
from layersweep.report.text import MISSING, fixed, signed
from layersweep.tasks.arms import BASELINE
from layersweep.units import format_bytes

Json = dict[str, Any]
DECIMALS = 4


def print_table(console: Console, results: Json) -> None:
    """A row for each metric and arm; differences are from the exact cache on the same documents."""
    table = Table(box=None, pad_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("arm", no_wrap=True)
    for name in ("value", "± stderr", "delta", "[95 % CI]", "lost", "gained", "p (Holm)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        _add(table, row)
    print_whole(console, Group(*_caption(results), table, *_notes(results)))


def _caption(results: Json) -> list[Text]:
    model, asked = results["model"], results["asked"]
    shots = "each task's own" if asked["num_fewshot"] is None else asked["num_fewshot"]
    limit = "all documents" if asked["limit"] is None else f"limit {asked['limit']:g}"
    return [
        Text(f"{Path(model['source']).name}: {model['weights']} weights, {results['dtype']}"),
        Text(
            f"lm-eval {results['versions']['lm_eval']}, few-shot examples: {shots}, {limit}; "
            "delta: arm - exact, document by document"
        ),
    ]


def _add(table: Table, row: Json) -> None:
    """The exact cache's line, then the arms'."""
    name = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
    arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
    first = row["task"], name + arrow, str(row["n"])
    differences = {one["arm"]: one for one in row["differences"]}
    for arm, value in row["values"].items():
        head = first if arm == BASELINE else ("", "", "")
        cells = _difference(differences.get(arm))
        spread = fixed(row["stderr"][arm], DECIMALS)
        table.add_row(*head, arm, fixed(value, DECIMALS), spread, *cells)


def _difference(one: Json | None) -> tuple[str, ...]:
    if one is None:
        return ("",) * 5
    bounds = one["ci95"]
    interval = MISSING
    if bounds is not None:
        interval = f"[{signed(bounds[0], DECIMALS)},{signed(bounds[1], DECIMALS)}]"
    counts = ("", "") if one["lost"] is None else (str(one["lost"]), str(one["gained"]))
    p = one["p_holm"]
    return (signed(one["delta"], DECIMALS), interval, *counts, "<1e-6" if p < 1e-6 else f"{p:.2g}")


def _notes(results: Json) -> list[Text]:
    performance = results["performance"]
    walks = f" and {performance['walks']} walks of generation" if performance["walks"] else ""
    lines = [
        f"{len(results['arms'])} arms in {performance['sweeps']} sweep(s){walks}: "
        f"{format_bytes(performance['weight_bytes_read'])} of weights read"
    ]
    if any(row["metric"] in (*PER_UNIT, PERPLEXITY) for row in results["rows"]):
        lines.append("the delta of a perplexity is that of its logarithm: nats per word or byte")
    for arm in results["arms"]:
        if arm["status"] != "ok":
            lines.append(f"note: {arm['arm']} has no results: {arm['why']}")
        if results["caches_grew"] and arm["growing"] != arm["arm"]:
            lines.append(f"note: {arm['arm']} is {arm['growing']} where a cache grows (answers, "
                         "rolling windows, empty contexts)")  # fmt: skip
    return [Text(line, style="yellow" if line.startswith("note") else "") for line in lines]
