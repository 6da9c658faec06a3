"""A float checkpoint as `--weights nf4` sees it, by the codec of the tests' own builders."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpoint_builders import pack, read_tensors, unpack
from safetensors.torch import save_file

# what stays float: it is small, and decides where a token goes, or it is no matrix product
FLOAT = (
    "embed",
    "lm_head",
    "router",
    ".gate.",
    "shared_expert_gate",
    "conv1d",
    "conv.conv",
    "norm",
    "bias",
)


def quantized(folder: Path, into: Path) -> None:
    """Every matrix of the layers rounded to NF4 (blocks of 64, plain absmax), as float32."""
    into.mkdir()
    shutil.copy(folder / "config.json", into)
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if tensor.ndim >= 2 and not any(part in name for part in FLOAT):
            # gpt_oss stores [in, out] of each expert; blocks run along what a row is multiplied by
            turned = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
            matrix = tensor.transpose(-1, -2) if turned else tensor
            packed = pack(name, matrix.reshape(-1, matrix.shape[-1]), nested=False)
            rounded = unpack(name, packed).view(matrix.shape)
            tensors[name] = (rounded.transpose(-1, -2) if turned else rounded).contiguous()
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
