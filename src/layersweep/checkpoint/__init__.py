"""Checkpoint files -> validated, named tensors. Only headers are read here, without torch."""

from layersweep.checkpoint.config import read_config
from layersweep.checkpoint.header import StoredTensor, read_header
from layersweep.checkpoint.layout import open_checkpoint, scan_checkpoint
from layersweep.checkpoint.weights import Checkpoint, Weight
from layersweep.problems import Problem

__all__ = [
    "Checkpoint",
    "Problem",
    "StoredTensor",
    "Weight",
    "open_checkpoint",
    "read_config",
    "read_header",
    "scan_checkpoint",
]
