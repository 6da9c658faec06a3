"""The three files of a finished evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layersweep.report.export import windows_csv
from layersweep.report.html import write_html
from layersweep.report.store import write_results
from layersweep.runs.files import write_atomically

WINDOWS_FILE = "windows.csv"


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """results.json, and of a complete run report.html and windows.csv, each whole or not at all.

    Raises OSError where they cannot be written.
    """
    write_results(folder, results)
    if results["status"] == "complete":
        write_html(folder, results)
        if results["perplexity"] is not None:
            write_atomically(folder / WINDOWS_FILE, windows_csv(results))
