"""`layersweep quantize`: a model in 16 bits becomes one in NF4."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from layersweep.units import format_bytes, format_seconds


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of safetensors, 16 bits.")],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must be new.")],
    blocksize: Annotated[int, typer.Option(help="Elements to a scale.")] = 64,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the scales too.")
    ] = True,
) -> None:
    """Write a model as NF4, in the layout and the bytes of bitsandbytes."""
    from layersweep.checkpoint.beside import shortened
    from layersweep.checkpoint.quantize import quantize as write
    from layersweep.progress import SweepProgress

    started = time.perf_counter()
    with SweepProgress(Console(stderr=True)) as progress:
        done = write(source, folder, blocksize=blocksize, nested=double_quant, progress=progress)
    spent = time.perf_counter() - started
    lines = (
        f"{folder}: {done.packed} weights as NF4; {format_bytes(done.before)} became "
        f"{format_bytes(done.after)} in {format_seconds(spent)} ({done.before / spent / 1e6:.0f} "
        "MB/s)",
        f"as before: {shortened(done.kept)}",
    )
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
