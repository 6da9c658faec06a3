"""`bench codec --model` and `calibrate`: what each stream of each layer costs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from layersweep.errors import Fallback, InputError

if TYPE_CHECKING:
    from layersweep.bench.sensitivity import Sample, Sensitivity
    from layersweep.kv.arms import Arm
    from layersweep.sweep.model import Model


def bench_model(source: str, kv: str, sample: Sample, device: str) -> None:
    """Tables for people on stderr, one JSON line on stdout."""
    from dataclasses import asdict

    from layersweep.environment import device_facts, versions
    from layersweep.kv.arms import parse_arms

    model, found = _measured(source, parse_arms(kv), sample, "auto", device)
    rows = [found.row(arm) for arm in found.arms]
    for row in rows:
        _show(row)
    line = {
        "bench": "codec",
        "model": {"source": Path(model.checkpoint.source).name,
                  "fingerprint": model.checkpoint.fingerprint,
                  "weights": model.checkpoint.weights_kind},
        **(asdict(sample) | {"text": Path(found.text.source).name}),
        "text_sha256": found.text.sha256,
        "rows": rows,
        "device": device_facts(str(model.compute.device)),
        "versions": dict(versions()),
    }  # fmt: skip
    typer.echo(json.dumps(line, allow_nan=False))


def calibrate(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="File to write, for @calibration=FILE.")],
    text: Annotated[str | None, typer.Option(help="UTF-8 text; else wikitext-2.")] = None,
    segments: Annotated[int, typer.Option(help="Windows.", min=1)] = 4,
    prefix: Annotated[int, typer.Option(help="Tokens that are coded.", min=1)] = 1024,
    continuation: Annotated[int, typer.Option(help="Tokens that read them.", min=2)] = 128,
    vram: Annotated[str, typer.Option(help="Device budget, for example 14GiB.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
) -> None:
    """Measure what the keys and values of each layer cost at 1 to 4 bits, for arms that give bits
    by layer: K3V2@calibration=FILE."""
    from layersweep.bench.calibrate import arms_to_measure, calibration_of
    from layersweep.bench.sensitivity import Sample
    from layersweep.kv.calibration import write_calibration

    if not out.absolute().parent.is_dir():  # said before an hour of measuring
        raise InputError(f"--out {out}: found no folder {out.parent}, needed one to write into")
    sample = Sample(text, segments, prefix, continuation)
    model, found = _measured(source, arms_to_measure(), sample, vram, device)
    calibration = calibration_of(model, found)
    write_calibration(out, calibration)
    console = Console()
    for keys, values in ((2, 2), (3, 2), (4, 2)):
        bits = calibration.bits(keys, values)
        each = " ".join(f"{k}{v}" for k, v in bits)
        console.print(f"K{keys}V{values}: {each}", highlight=False, soft_wrap=True)
    console.print(f"{out}: bits of keys and values by layer, as above, with K3V2@calibration={out}",
                  highlight=False, markup=False, soft_wrap=True)  # fmt: skip


def _measured(
    source: str, arms: list[Arm], sample: Sample, vram: str, device: str
) -> tuple[Model, Sensitivity]:
    from layersweep.bench.sensitivity import measure_parts
    from layersweep.progress import SweepProgress
    from layersweep.sweep.model import load

    console = Console(stderr=True)
    model = load(source, vram=vram, device=device)
    fallbacks = list(model.compute.fallbacks)
    if model.decoder.generic:
        why = "transformers' own layers compute this model"
        fallbacks.append(Fallback("attention", "its KL and its output's error", "neither", why))
    for fallback in fallbacks:
        console.print(f"fallback: {fallback}", highlight=False, markup=False, soft_wrap=True)
    with SweepProgress(console) as progress:
        return model, measure_parts(model, arms, sample, progress)


def _show(row: dict[str, Any]) -> None:
    """KL and loss of each stream of each layer, KL of attention, error of attention's output."""
    console = Console(stderr=True)
    streams: list[str] = [name for name in ("keys", "values") if name in row]
    table = Table(title=row["job"], box=None, pad_edge=False, title_justify="left")
    table.add_column("layer")
    for stream in streams:
        for what in (stream, "loss", *(("attention",) if stream == "keys" else ()), "output"):
            table.add_column(what, justify="right")
    for layer in row["layers"]:
        table.add_row(str(layer["layer"]), *_cells(layer, streams))
    table.add_row("all", *_cells(row, streams))
    console.print(table)
    bits, kl, loss = (
        row["bits_per_element"],
        row["everything"]["kl"],
        row["everything"]["delta_nll"],
    )
    words = [
        f"everything: {'?' if bits is None else f'{bits:.2f}'} bits", f"KL {_milli(kl)}",
        f"loss {_milli(loss)}", f"sum of the KL of single layers {_milli(sum_of_parts(row))}",
    ]  # fmt: skip
    console.print(", ".join(words), highlight=False)
    console.print(
        "keys, values: KL of predictions; attention: KL of its weights; these and the loss in "
        "thousandths of a nat per token; output: squared error of attention's output over energy",
        highlight=False,
    )


def sum_of_parts(row: dict[str, Any]) -> float | None:
    """Of the KL of every stream of every layer alone."""
    found = [
        layer[stream]["kl"] for layer in row["layers"] for stream in layer if stream != "layer"
    ]
    return None if None in found else sum(found)


def _cells(of: dict[str, Any], streams: list[str]) -> list[str]:
    cells = []
    for stream in streams:
        figures = of.get(stream, {})
        cells += [_milli(figures.get("kl")), _milli(figures.get("delta_nll"))]
        if stream == "keys":
            cells.append(_milli(figures.get("attention_kl")))
        error = figures.get("output_error")
        cells.append("" if error is None else f"{error:.5f}")
    return cells


def _milli(nats: float | None) -> str:
    return "" if nats is None else f"{1000 * nats:.3f}"
