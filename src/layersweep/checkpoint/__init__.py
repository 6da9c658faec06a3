"""Checkpoint files -> validated, named tensors. Only headers are read here; torch only in `nf4`."""

from layersweep.checkpoint.config import read_config
from layersweep.checkpoint.header import StoredTensor, read_header
from layersweep.checkpoint.layout import open_checkpoint, scan_checkpoint
from layersweep.checkpoint.weights import Checkpoint, Nested, Quant, Weight
from layersweep.problems import Problem

__all__ = [
    "Checkpoint",
    "Nested",
    "Problem",
    "Quant",
    "StoredTensor",
    "Weight",
    "open_checkpoint",
    "read_config",
    "read_header",
    "scan_checkpoint",
]
