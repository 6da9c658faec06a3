"""`layersweep synth`: a full-size checkpoint with random weights, to measure speed and memory."""

from __future__ import annotations

import difflib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from layersweep.errors import InputError
from layersweep.units import format_bytes, format_seconds


def synth(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must be new.")],
    shape: Annotated[str, typer.Option(help="mixtral-8x7b.")] = "mixtral-8x7b",
    layers: Annotated[int | None, typer.Option(help="Layers instead of the shape's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a synthetic NF4 checkpoint in the published layout, marked as synthetic."""
    from layersweep.checkpoint.synth import SHAPES, write_synthetic
    from layersweep.progress import SweepProgress

    if shape not in SHAPES:
        close = difflib.get_close_matches(shape, SHAPES, n=1)
        raise InputError(
            f"--shape: found '{shape}', needed one of {', '.join(SHAPES)}",
            hint=f"did you mean {close[0]}?" if close else "--shape mixtral-8x7b",
        )
    config = SHAPES[shape]
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise InputError(
                f"--layers: found {layers}, needed 1 to {config.num_hidden_layers}",
                hint=f"--layers {config.num_hidden_layers}",
            )
        config = replace(config, num_hidden_layers=layers)
    started = time.perf_counter()
    with SweepProgress(Console(stderr=True)) as progress:
        size = write_synthetic(folder, config, seed=seed, progress=progress)
    spent = format_seconds(time.perf_counter() - started)
    Console().print(
        f"{folder}: {shape}, {config.num_hidden_layers} layers, {format_bytes(size)}, synthetic, "
        f"written in {spent}",
        highlight=False,
        soft_wrap=True,
    )
