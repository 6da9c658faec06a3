"""Each architecture of GGUF: a tiny model of transformers, converted, has transformers' losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import oracle, ours
from families.checks import TOLERANCE, Subject
from families.parts import GROUPS, LLAMA3, THETA, YARN, biased, rope, two_ropes
from families.small import Tiny
from gguf_convert import convert, halves, metadata, put, random_blocks, tensors, write

from layersweep.checkpoint import open_checkpoint
from layersweep.checkpoint.storage.ggml import DECODED
from layersweep.model.rope import inverse_frequencies

SCALED = two_ropes({"rope_type": "linear", "factor": 2.0}, theta=10_000.0) | {
    "num_hidden_layers": 6,  # of which llama.cpp takes every sixth without a window
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
}
LATENT = rope(
    "yarn", factor=8.0, mscale=0.6, mscale_all_dim=0.6, original_max_position_embeddings=64
)
MODELS: Mapping[str, Tiny] = {
    "llama": Tiny("llama", biased(mlp_bias=True), published=True),
    "llama:yarn": Tiny("llama", YARN, published=True),
    "llama:tied": Tiny("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mixtral": Tiny("mixtral", {"sliding_window": None}, published=True),
    "qwen2": Tiny("qwen2", published=True),
    "qwen3": Tiny("qwen3"),
    "qwen3_moe": Tiny("qwen3_moe"),
    "gemma2": Tiny("gemma2", {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0}),
    "gemma3_text": Tiny("gemma3_text", {"query_pre_attn_scalar": 32, **SCALED}),
    "gpt_oss": Tiny("gpt_oss", published=True),
    "deepseek_v2": Tiny("deepseek_v2", {**LATENT, "q_lora_rank": None, "norm_topk_prob": False}),
    "deepseek_v3": Tiny("deepseek_v3", {**LATENT, **GROUPS}),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_transformers(name: str, tmp_path: Path) -> None:
    subject = Subject.of(MODELS[name], tmp_path)
    path = convert(tmp_path, tmp_path / "model.gguf")
    assert ours.losses(ours.opened(path)).distance(subject.expected) < TOLERANCE
    if name == "mixtral":
        apart = convert(tmp_path, tmp_path / "apart.gguf", merged=False)
        assert ours.losses(ours.opened(apart)).distance(subject.expected) < TOLERANCE


def test_frequencies_in_a_tensor_are_llama_3s(tmp_path: Path) -> None:
    subject = Subject.of(Tiny("llama", LLAMA3, published=True), tmp_path)
    own = open_checkpoint(str(tmp_path)).decoder.layers[0].attention.rope
    assert own is not None
    plain = THETA ** (-torch.arange(0, 32, 2) / 32)
    factors = {"rope_freqs.weight": plain / inverse_frequencies(own, 512)}
    path = convert(tmp_path, tmp_path / "model.gguf", extra=factors)
    assert ours.losses(ours.opened(path)).distance(subject.expected) < TOLERANCE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Rows of 256 numbers, as K-quants need them."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    return Subject.of(Tiny("llama", sizes), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", ["F16", "BF16", *DECODED])
def test_every_type_is_read_as_gguf_dequantizes_it(
    kind: str, llama: Subject, tmp_path: Path
) -> None:
    """Matrices of any bits; transformers has what the gguf package makes of them."""
    drawn, fields = np.random.default_rng(0), llama.model.config.to_dict()
    heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, value in metadata(fields).items():
        put(writer, f"llama.{name}", value)
    weights = llama.model.state_dict()
    for (name, weight), theirs in zip(weights.items(), tensors(fields, weights), strict=True):
        if weight.dim() == 1:
            writer.add_tensor(theirs, weight.numpy())
            continue
        number, data = gguf.GGMLQuantizationType[kind], random_blocks(kind, *weight.shape, drawn)
        writer.add_tensor(theirs, data, raw_dtype=number)
        dense = torch.from_numpy(gguf.dequantize(data, number).copy())
        own = heads.get(name.split(".")[-2])
        weight.copy_(halves(dense, own) if own else dense)
    write(writer)
    losses = oracle.losses(llama.model)
    assert losses.distance(llama.expected) > 0.01
    assert ours.losses(ours.opened(tmp_path / "model.gguf")).distance(losses) < TOLERANCE


def test_keys_and_values_of_a_latent_may_lie_apart(tmp_path: Path) -> None:
    """As converters since 2025 write it, with one head of keys."""
    subject = Subject.of(MODELS["deepseek_v2"], tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    heads, nope, value = (
        fields[name] for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
    )

    def split(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith("attn_kv_b.weight"):
            return {name: tensor}
        keys, values = tensor.view(heads, nope + value, -1).split([nope, value], dim=1)
        parts = {"attn_k_b": keys.transpose(1, 2), "attn_v_b": values}
        return {name.replace("attn_kv_b", part): one for part, one in parts.items()}

    lengths = {"key": nope + fields["qk_rope_head_dim"], "value": value}
    rank = fields["kv_lora_rank"]
    more = {f"attention.{part}_length_mla": size for part, size in lengths.items()} | {
        "attention.key_length": rank + fields["qk_rope_head_dim"],
        "attention.value_length": rank,
        "attention.head_count_kv": 1,
    }
    path = convert(tmp_path, tmp_path / "model.gguf", more=more, change=split)
    model = ours.opened(path)
    assert model.checkpoint.weights["layers.0.kv_b_proj"].storage.words == "keys and values apart"
    assert ours.losses(model).distance(subject.expected) < TOLERANCE
