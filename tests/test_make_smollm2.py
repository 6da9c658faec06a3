"""tools/make_smollm2.py: a dense Llama as GGUF has it becomes a Mixtral that computes the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import layersweep
from layersweep.checkpoint import open_checkpoint
from layersweep.text.tokenizer import TextTokenizer

TOOLS = str(Path(__file__).resolve().parent.parent / "tools")
with pytest.MonkeyPatch.context() as patch:  # the tool imports another one
    patch.syspath_prepend(TOOLS)
    import make_smollm2 as tool

    sys.modules.pop("make_demo", None)

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 96
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789.,", "\u0120"})
MERGES = ["t h", "th e", "\u0120 the", "1 2"]
TOKENS = [*WORDS, *LETTERS, "th", "the", "\u0120the", "12"]


def side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp's converter permutes them."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shapes = {
        "vocab_size": len(TOKENS), "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "rms_norm_eps": 1e-5,
        "num_key_value_heads": KV_HEADS, "rope_theta": 1e4, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shapes, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def source(dense: LlamaForCausalLM) -> tool.Source:
    weights = {"output_norm.weight": dense.model.norm.weight.detach()}
    weights["token_embd.weight"] = dense.model.embed_tokens.weight.detach()
    names = tool.LAYER | {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "down", "up")}
    for layer, module in enumerate(dense.model.layers):
        for theirs, ours in names.items():
            weights[f"blk.{layer}.{theirs}.weight"] = module.get_parameter(
                f"{ours}.weight"
            ).detach()
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            at = f"blk.{layer}.{name}.weight"
            weights[at] = side_by_side(weights[at], heads)
    settings = {
        "block_count": LAYERS, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "rope.freq_base": 1e4,
        "context_length": 512,
    }  # fmt: skip
    fields = {f"llama.{name}": value for name, value in settings.items()}
    kinds = [tool.CONTROL] * 3 + [1] * (len(TOKENS) - 3)
    fields |= {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": MERGES}
    fields |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.add_bos_token": False}
    for name, token in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        fields[f"tokenizer.ggml.{name}_token_id"] = token
    fields["tokenizer.chat_template"] = "{{ messages[0]['content'] }}"
    return tool.Source(fields, weights)


@pytest.fixture(scope="module", params=[1, 2, 4])
def folder(
    source: tool.Source, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    made = tmp_path_factory.mktemp(f"experts{request.param}")
    tool.write(source, made, request.param)
    return made


def test_it_computes_what_the_dense_model_computes(folder: Path, dense: LlamaForCausalLM) -> None:
    """The dense model's own rows: a wrong order of q and k would turn other pairs."""
    with torch.no_grad():
        expected = LlamaForCausalLM(dense.config).eval()
        expected.load_state_dict(
            {
                name: tool.through_nf4(weight)
                if weight.ndim == 2 and "layers" in name
                else weight.to(torch.bfloat16).float()
                for name, weight in dense.state_dict().items()
            }
        )
    ids = torch.randint(len(TOKENS), (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        scores = expected(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    found = layersweep.load(str(folder), device="cpu").score([ids[0].tolist()])[0]
    assert (found - scores).abs().max() < 1e-4


def test_the_layout_is_the_published_one(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.weights_kind, checkpoint.router_kind) == ("nf4", "bfloat16")
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.config.rms_norm_eps == 1e-5
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("lm_head" in name for name in stored)  # tied: kept once
    assert "Apache-2.0" in (folder / "MODEL_CARD.md").read_text()


def test_its_own_check_passes(source: tool.Source, folder: Path, capsys) -> None:
    tool.check(source, folder, "the cat, the 12 hats. " * 40, windows=2, tokens=30)
    assert capsys.readouterr().out.count("difference") == 2


def test_digits_stay_alone_and_chats_have_special_tokens(folder: Path) -> None:
    tokenizer = TextTokenizer.load(folder)
    words = [TOKENS[token] for token in tokenizer.encode("the cat the 12")]
    assert words == ["the", "\u0120", "c", "a", "t", "\u0120the", "\u0120", "1", "2"]
    assert (tokenizer.bos_id, tokenizer.bos_by_default) == (1, False)
    assert tokenizer.render_chat("the cat") == "the cat"
    assert [TOKENS[token] for token in tokenizer.encode_chat("<|im_start|>a")[0]] == [WORDS[1], "a"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match=r"found sha256 .* needed"):
        tool.find_gguf(tmp_path / "x.gguf", tmp_path)
