"""Checkpoint files -> validated, named tensors. Only headers are read here; torch only in `nf4`."""

from layersweep.checkpoint.config import ModelConfig, read_config
from layersweep.checkpoint.header import StoredTensor, read_header
from layersweep.checkpoint.layout import open_checkpoint, scan_checkpoint
from layersweep.checkpoint.problems import Problem
from layersweep.checkpoint.weights import Checkpoint, Nested, Quant, Weight

__all__ = [
    "Checkpoint",
    "ModelConfig",
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
