"""`layersweep merge`: the parts of a study that several hosts computed, as one result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from layersweep.cli.command import command_line
from layersweep.errors import InputError


def merge(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of `eval --shard i/n --out`.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the result; none: no files.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Only the JSON on stdout.")] = False,
) -> None:
    """Put shards together: the numbers of one run on one machine, bit for bit."""
    from rich.console import Console

    from layersweep.report.files import write_report
    from layersweep.report.store import load_results
    from layersweep.report.table import print_report
    from layersweep.runs.files import writing
    from layersweep.runs.folder import MANIFEST, parts_of, read_part, write_merged
    from layersweep.runs.merge import merge as merge_parts

    folders = [part for directory in directories for part in parts_of(directory)]
    parts = [read_part(folder, load_results) for folder in folders]
    merged = merge_parts(parts, command=command_line())
    if merged.missing:
        there = ", ".join(sorted({part.shard for part in parts}))
        raise InputError(
            f"merge: found {len(merged.record.tiles) - len(merged.missing)} of "
            f"{len(merged.record.tiles)} tiles in shards {there}, needed all; the first that is "
            f"missing is {merged.missing[0].words}",
            hint="name the folders of all shards; one that was stopped continues with --resume",
        )
    if out is not None:
        if (out / MANIFEST).exists():
            raise InputError(
                f"--out {out}: found a run there, needed a folder without one",
                hint="name another folder",
            )
        with writing(out, "merge again"):
            write_merged(out, merged, folders)
            write_report(out, merged.results)
    if json_output:
        sys.stdout.write(json.dumps(merged.results, allow_nan=False) + "\n")
    else:
        print_report(Console(), merged.results)
