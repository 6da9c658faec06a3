"""Run docs/notebooks/quickstart.ipynb and keep its outputs in the file.

It runs in an empty folder, with the layersweep of this clone. What differs with every commit or
machine is taken out of the outputs: the commit, times of cells, ids of displays, Python's version.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient

PROJECT = Path(__file__).resolve().parents[1]
NOTEBOOK = PROJECT / "docs/notebooks/quickstart.ipynb"
CELL_TIMEOUT_S = 300
FAILURE = re.compile(r"^(Traceback|error: |hint: |.*: (command )?not found)", re.MULTILINE)
COMMIT = re.compile(r" git [0-9a-f]{7,40}(-dirty)?")


def execute(path: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """The notebook with fresh outputs. Raises nbclient's CellExecutionError where a cell does."""
    notebook = nbformat.read(path, as_version=4)
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",  # the last digits of the tests, which have a process per core
        "PYTHONPATH": os.pathsep.join([str(PROJECT / "src"), *sys.path]),
    }
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment):
        os.environ.pop("COLUMNS", None)  # of the terminal this runs in, or of a test runner
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what says nothing to a reader and would change in every version of the file."""
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = COMMIT.sub("", output.text.replace("\r\n", "\n"))
            elif "transient" in output:
                del output["transient"]
    return notebook


def failed_commands(notebook: nbformat.NotebookNode) -> list[str]:
    """Last lines of `!commands` that failed: a notebook goes on behind them."""
    return [
        output.text.strip().splitlines()[-1]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and FAILURE.search(output.text)
    ]


def main() -> None:
    notebook = execute()
    if failures := failed_commands(notebook):
        sys.exit("\n".join(failures))
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)
    print(f"wrote {NOTEBOOK}")


if __name__ == "__main__":
    main()
