"""A whole study that takes half a second, for tests of what happens around its numbers.

Its model is a Mixtral of 2 layers with untrained weights and the demo's tokenizer, marked as
synthetic: the gate asks nothing of its losses. Whoever asserts what a trained model does takes
the demo.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import layersweep
from layersweep.checkpoint.synth import write_synthetic
from layersweep.checkpoint.synth_shapes import MIXTRAL_8X7B
from layersweep.cli.app import run

TINY = MIXTRAL_8X7B.with_fields(
    {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 4, "max_position_embeddings": 1024,
    }
)  # fmt: skip
SETTINGS = (
    "--kv", "fp8", "--segments", "40", "--prefix", "96", "--continuation", "32",
    "--niah-context", "384", "--niah-per-depth", "1",
)  # fmt: skip
TILES = 3  # 2 of windows, 1 of needles
MIDDLE = 5  # of the 10 or more steps that a sweep reports: a tile or an expert in a layer each
ONE_TILE = "300MiB"  # of --vram: room for one of them at a time, so 3 sweeps
KILLED = str(Path(__file__).with_name("killed_in_second_sweep.py"))  # runs instead of layersweep


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """One per process; gone at its end."""
    return tempfile.TemporaryDirectory(prefix="tiny-study-")


@cache
def model_folder() -> Path:
    folder = Path(_folder().name) / "model"
    write_synthetic(folder, TINY)
    return folder


@cache
def text_file() -> Path:
    """The beginning of the demo's held-out text: all of a text is tokenized."""
    heldout = Path(layersweep.__file__).parent / "demo/text/heldout.txt"
    file = Path(_folder().name) / "text.txt"
    file.write_text(heldout.read_text("utf-8")[:60_000], "utf-8")
    return file


def words(*more: str, model: Path | None = None) -> list[str]:
    """The command line of the study; options in `more` come last, so they win."""
    return ["eval", str(model or model_folder()), "--text", str(text_file()), *SETTINGS, *more]


def evaluate(*more: str) -> int:
    return run(words(*more))
