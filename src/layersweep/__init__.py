"""layersweep: run and evaluate language models whose weights do not fit the GPU.

model = layersweep.load("demo")          # headers only
model.score([[1, 2, 3]])                 # log-probabilities, one sweep
layersweep.evaluate(model, kv=["K3V2"])  # the results of `layersweep eval`, shown as its table
layersweep.Results.read("results/first") # those of a run's folder
layersweep.kv.parse("K3V2")              # a KV arm: encode, decode, append, nbytes
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from layersweep import kv
    from layersweep.api import evaluate, load
    from layersweep.report.results import Results
    from layersweep.sweep.model import Model

__all__ = ["Model", "Results", "__version__", "evaluate", "kv", "load"]

_LAZY = {
    "Model": "layersweep.sweep.model",
    "kv": "layersweep.kv",
    "load": "layersweep.api",
    "evaluate": "layersweep.api",
    "Results": "layersweep.report.results",
}


def __getattr__(name: str) -> Any:
    """Public names load torch only when they are used: importing the package takes no time."""
    if name not in _LAZY:
        raise AttributeError(f"module 'layersweep' has no attribute '{name}'")
    module = importlib.import_module(_LAZY[name])
    return module if name == "kv" else getattr(module, name)
