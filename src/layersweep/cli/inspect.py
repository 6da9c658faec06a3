"""`layersweep inspect`: what a checkpoint holds, layer by layer, and every problem at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layersweep.checkpoint import Checkpoint, Problem, Weight, scan_checkpoint
from layersweep.checkpoint.beside import shortened
from layersweep.errors import CheckpointError
from layersweep.families.spec import Decoder, describe_decoder
from layersweep.families.weights import embed_block, head_block
from layersweep.families.words import describe_layer
from layersweep.problems import printable
from layersweep.units import format_bytes

PLAIN_WIDTH = 120  # where stdout is no terminal, rows must not be folded at 80
_EXPERT = re.compile(r"experts\.(\d+)\.(.+)")


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or demo.")] = "demo",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show how every layer is stored, and everything that is wrong; reads headers only."""
    checkpoint, problems = scan_checkpoint(model, revision)
    if json_output:
        typer.echo(json.dumps(_as_json(model, checkpoint, problems), allow_nan=False))
    else:
        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = max(console.width, PLAIN_WIDTH)
        if checkpoint is not None:
            _show(console, checkpoint)
        for problem in problems:  # not through rich: there may be 100,000
            typer.echo(f"problem: {problem.sentence()}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise CheckpointError(
            f"{printable(model)}: found {count}, needed none", hint=problems[0].hint
        )


def _show(console: Console, checkpoint: Checkpoint) -> None:
    decoder = checkpoint.decoder
    revision = f"@{checkpoint.revision}" if checkpoint.revision else ""
    console.print(
        f"{printable(checkpoint.source)}{revision}  {describe_decoder(decoder)}, "
        f"hidden {decoder.hidden_size}, "
        f"vocabulary {decoder.vocab_size}",
        soft_wrap=True,
    )
    files = "1 file" if len(checkpoint.files) == 1 else f"{len(checkpoint.files)} files"
    console.print(
        f"weights {checkpoint.storage}, {format_bytes(checkpoint.nbytes)} in {files}",
        soft_wrap=True,
    )
    if "mixed" in checkpoint.storage:
        each = (
            f"{count} x {kind} {format_bytes(nbytes)}"
            for kind, (count, nbytes) in checkpoint.kinds.items()
        )
        console.print(f"mixed: {', '.join(each)}", soft_wrap=True)
    console.print(f"fingerprint {checkpoint.fingerprint}", soft_wrap=True)
    for words in layer_lines(decoder):
        console.print(words, soft_wrap=True)
    console.print()
    console.print(_table(checkpoint))
    for note in checkpoint.notes:
        console.print(f"note: {printable(note)}", soft_wrap=True)
    for what, names in (
        ("config fields read but not used", checkpoint.unused_fields),
        ("files not used", checkpoint.unused_files),
    ):
        if names:
            console.print(f"{what}: {shortened(names)}", soft_wrap=True)


def layer_lines(decoder: Decoder) -> Iterable[str]:
    """What each distinct kind of layer computes."""
    for layer in decoder.distinct_layers:
        alike = [index for index, one in enumerate(decoder.layers) if one == layer]
        together = alike[-1] - alike[0] + 1 == len(alike)
        label = _ranges(alike) if together else f"{alike[0]} and {len(alike) - 1} more"
        words = describe_layer(layer, foreign=decoder.generic is not None)
        yield f"{'layer' if len(alike) == 1 else 'layers'} {label}: {words}"


def _table(checkpoint: Checkpoint) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layers", no_wrap=True)
    table.add_column("stored", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("scales", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for label, rows, total in _sections(checkpoint):
        for position, (part, weight, nbytes) in enumerate(rows):
            shape = "x".join(map(str, weight.shape))
            cells = [label if not position else "", f"{part}: {weight.describe()}", shape]
            cells += [_scales(weight), format_bytes(nbytes)]
            table.add_row(*(Text(cell) for cell in cells))
        if total:
            table.add_row("", "", "", Text(f"layers {label} together"), Text(format_bytes(total)))
    return table


Rows = list[tuple[str, Weight, int]]  # part of a layer, one weight of that kind, bytes of all


def _sections(checkpoint: Checkpoint) -> Iterable[tuple[str, Rows, int]]:
    """(layers, rows of the first, bytes of all): runs of layers that are stored alike."""
    weights, decoder = checkpoint.weights, checkpoint.decoder
    for name in embed_block(decoder).weights:
        yield "", [(name, weights[name], weights[name].nbytes)], 0
    layers = [(layer, _layer_rows(checkpoint, layer)) for layer in range(decoder.num_hidden_layers)]
    for _, group in groupby(layers, key=lambda item: _signature(item[1])):
        members = list(group)
        total = sum(nbytes for _, rows in members for _, _, nbytes in rows)
        yield _ranges([layer for layer, _ in members]), members[0][1], total
    for name in head_block(decoder).weights:
        yield "", [(name, weights[name], weights[name].nbytes)], 0


def _layer_rows(checkpoint: Checkpoint, layer: int) -> Rows:
    """Weights of a layer; experts that are stored alike share one row."""
    prefix = f"layers.{layer}."
    own = {
        name.removeprefix(prefix): weight
        for name, weight in checkpoint.weights.items()
        if name.startswith(prefix)
    }
    rows: Rows = [
        (part, weight, weight.nbytes) for part, weight in own.items() if not _EXPERT.match(part)
    ]
    alike: dict[tuple[str, object], list[tuple[int, Weight]]] = {}
    for part, weight in own.items():
        if match := _EXPERT.match(part):
            key = (match[2], _storage(weight))
            alike.setdefault(key, []).append((int(match[1]), weight))
    for (which, _), found in sorted(alike.items(), key=lambda item: item[1][0][0]):
        numbers = [number for number, _ in found]
        total = sum(weight.nbytes for _, weight in found)
        rows.append((f"experts {_ranges(numbers)} {which}", found[0][1], total))
    return rows


def _signature(rows: Rows) -> list[object]:
    return [(part, _storage(weight)) for part, weight, _ in rows]


def _storage(weight: Weight) -> tuple[object, ...]:
    """Equal for weights that are stored alike (their quant_state JSON may differ in length)."""
    return weight.describe(), weight.shape, _scales(weight)


def _scales(weight: Weight) -> str:
    return weight.storage.words


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _as_json(model: str, checkpoint: Checkpoint | None, problems: list[Problem]) -> dict[str, Any]:
    content: dict[str, Any] = {"model": model, "problems": [asdict(item) for item in problems]}
    if checkpoint is None:
        return content
    return content | {
        "revision": checkpoint.revision,
        "config": asdict(replace(checkpoint.decoder, generic=None)),
        "program": "generic" if checkpoint.decoder.generic else "own",
        "weights_kind": checkpoint.weights_kind,
        "router_kind": checkpoint.router_kind,
        "bytes": checkpoint.nbytes,
        "files": [str(file) for file in checkpoint.files],
        "fingerprint": checkpoint.fingerprint,
        "notes": list(checkpoint.notes),
        "unused_config_fields": list(checkpoint.unused_fields),
        "unused_files": list(checkpoint.unused_files),
        "weights": {
            name: {
                "stored": weight.describe(),
                "shape": list(weight.shape),
                "scales": _scales(weight) or None,
                "bytes": weight.nbytes,
                "file": weight.data.file.name,
            }
            for name, weight in checkpoint.weights.items()
        },
    }
