"""A float checkpoint as `--weights nf4` sees it, by the codec of the tests' own builders."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpoint_builders import pack, read_tensors, unpack
from safetensors.torch import save_file

# what stays float: it is small, and decides where a token goes, or it is no matrix product
FLOAT = ("embed", "lm_head", "router", ".gate.", "shared_expert_gate", "conv", "norm", "bias")


def quantized(folder: Path, into: Path) -> None:
    """Every matrix of the layers rounded to NF4 (blocks of 64, plain absmax), as float32."""
    into.mkdir()
    shutil.copy(folder / "config.json", into)
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if tensor.ndim >= 2 and not any(part in name for part in FLOAT):
            rows = tensor.reshape(-1, tensor.shape[-1])
            packed = pack(name, rows, nested=False)
            tensors[name] = unpack(name, packed).view(tensor.shape)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
