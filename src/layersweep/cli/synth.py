"""`layersweep synth`: a full-size checkpoint with random weights, to measure speed and memory."""

from __future__ import annotations

import difflib
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from layersweep.errors import InputError
from layersweep.units import format_bytes, format_seconds

SHAPE_HELP = (  # their table is not imported for --help
    "mixtral-8x7b, mixtral-8x22b, llama-3.1-8b, qwen3-30b-a3b, gpt-oss-20b, gpt-oss-120b, "
    "glm-4.5-air, deepseek-v2-lite or deepseek-v3."
)


def synth(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must be new.")],
    shape: Annotated[str, typer.Option(help=SHAPE_HELP)] = "mixtral-8x7b",
    layers: Annotated[int | None, typer.Option(help="Layers instead of the shape's.")] = None,
    weights: Annotated[str, typer.Option(help="nf4, mxfp4 (gpt-oss) or fp8 (others).")] = "nf4",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a checkpoint with random weights under published names, marked as synthetic."""
    from layersweep.checkpoint.synth import write_synthetic
    from layersweep.checkpoint.synth_shapes import SETTINGS, SHAPES
    from layersweep.progress import SweepProgress

    if shape not in SHAPES:
        close = difflib.get_close_matches(shape, SHAPES, n=1)
        raise InputError(
            f"--shape: found '{shape}', needed one of {', '.join(SHAPES)}",
            hint=f"did you mean {close[0]}?" if close else "--shape mixtral-8x7b",
        )
    kind = next((one for one in SETTINGS if one == weights), None)
    if kind is None:
        raise InputError(f"--weights: found '{weights}', needed one of {', '.join(SETTINGS)}")
    published = SHAPES[shape].with_weights(kind)
    if layers is not None:
        there = published.decoder.num_hidden_layers
        if not 1 <= layers <= there:
            raise InputError(
                f"--layers: found {layers}, needed 1 to {there}", hint=f"--layers {there}"
            )
        published = published.with_layers(layers)
    started = time.perf_counter()
    with SweepProgress(Console(stderr=True)) as progress:
        size = write_synthetic(folder, published, seed=seed, progress=progress)
    spent = format_seconds(time.perf_counter() - started)
    Console().print(
        f"{folder}: {shape}, {published.decoder.num_hidden_layers} layers, {format_bytes(size)}, "
        f"synthetic, written in {spent}",
        highlight=False,
        soft_wrap=True,
    )
