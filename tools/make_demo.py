"""Convert a bf16 Mixtral (per-expert names) into the NF4 layout in which checkpoints are published.

    python tools/make_demo.py SRC DST [--shards 3]

Every Linear, the router included, becomes NF4 with double quantization; embedding, head and
norms stay bf16. Shards are cut at equal bytes, tensor by tensor, so companions of a weight may
lie in another shard than the weight, as they do in published checkpoints.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layersweep.checkpoint import nf4

QUANTIZATION_CONFIG = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
KEPT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.destination, arguments.shards)


def convert(source: Path, destination: Path, shards: int) -> None:
    """Write the NF4 checkpoint. The destination must not hold safetensors files yet."""
    if list(destination.glob("*.safetensors")):
        raise SystemExit(f"{destination} already holds safetensors files: choose an empty folder")
    destination.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, weight in sorted(read_tensors(source).items()):
        tensors.update(convert_weight(name, weight))
    write_shards(tensors, destination, shards)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION_CONFIG
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in KEPT_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)


def read_tensors(source: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def convert_weight(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of one weight: packed with companions, or itself in bf16."""
    if weight.ndim != 2 or name in ("model.embed_tokens.weight", "lm_head.weight"):
        return {name: weight.to(torch.bfloat16)}
    return nf4.to_tensors(name, nf4.quantize(weight), torch.bfloat16, weight.shape)


def write_shards(tensors: dict[str, Tensor], destination: Path, shards: int) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    groups: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    written = 0
    for name, tensor in tensors.items():
        groups[min(shards - 1, written * shards // total)][name] = tensor.contiguous()
        written += tensor.nbytes
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file_name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(group, destination / file_name, metadata={"format": "pt"})
        (destination / file_name).chmod(0o644)  # it is written readable by its owner alone
        weight_map.update(dict.fromkeys(group, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    index_path = destination / "model.safetensors.index.json"
    index_path.write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
