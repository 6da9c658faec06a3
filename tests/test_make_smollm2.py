"""tools/make_smollm2.py: a Llama out of a GGUF, as transformers opens it, and in NF4."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from layersweep.checkpoint import nf4
from layersweep.study.gate import COPY, Card
from layersweep.study.gate_tokens import choose_tokens
from layersweep.text.chat import Message
from layersweep.text.source import headings
from layersweep.text.tokenizer import TextTokenizer, hash_ids

TOOLS = str(Path(__file__).resolve().parent.parent / "tools")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(TOOLS)
    import make_smollm2 as tool

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
    for layer, module in enumerate(dense.model.layers):
        for theirs, ours in tool.LAYER.items():
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
    kinds = [3] * 3 + [1] * (len(TOKENS) - 3)
    fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    fields |= {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": MERGES}
    fields |= {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.add_bos_token": False}
    for name, token in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        fields[f"tokenizer.ggml.{name}_token_id"] = token
    fields["tokenizer.chat_template"] = "{{ messages[0]['content'] }}"
    return tool.Source(fields, weights)


@pytest.fixture(scope="module")
def folder(source: tool.Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("smollm2")
    tool.write(source, made)
    return made


def ids() -> Tensor:
    return torch.randint(len(TOKENS), (1, 40), generator=torch.Generator().manual_seed(1))


def test_transformers_opens_the_model_that_was_in_the_gguf(
    folder: Path, dense: LlamaForCausalLM
) -> None:
    """Its weights, and its logits: a wrong order of q and k would turn other pairs."""
    found = AutoModelForCausalLM.from_pretrained(folder / "smollm2-bf16", dtype=torch.float32)
    assert type(found) is LlamaForCausalLM
    assert found.lm_head.weight is found.model.embed_tokens.weight
    expected = {name: w.to(torch.bfloat16).float() for name, w in dense.state_dict().items()}
    assert all(torch.equal(found.state_dict()[name], expected[name]) for name in expected)
    rounded = LlamaForCausalLM(dense.config).eval()
    rounded.load_state_dict(expected)
    with torch.inference_mode():
        assert torch.equal(found.eval()(ids()).logits, rounded(ids()).logits)
    settings = ("rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id")
    assert [getattr(found.config, name) for name in settings] == [1e-5, 512, 1, 2]
    assert found.config.rope_parameters["rope_theta"] == 1e4


def test_the_other_folder_is_what_quantize_makes_of_it(folder: Path) -> None:
    dense, packed = (load_file(folder / name / "model.safetensors") for name in tool.CARDS)
    assert len(dense) == 2 + 9 * LAYERS
    assert not any("lm_head" in name for name in dense)  # tied: kept once
    model = tool.dense_model(folder / "smollm2-nf4").state_dict()
    for name, weight in dense.items():
        if weight.ndim == 2 and "layers" in name:
            quantized = nf4.quantize(weight)
            scales = quantized.scales()
            weight = nf4.dequantize(quantized.packed, scales, 64, weight.shape, torch.float32)
            assert packed[name].dtype == torch.uint8
        assert torch.equal(model[name], weight.float()), name
    config = json.loads((folder / "smollm2-nf4/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"]


def test_each_folder_is_whole(folder: Path) -> None:
    common = {"config.json", "generation_config.json", "model.safetensors", "card.json"}
    common |= {"tokenizer.json", "tokenizer_config.json"}
    dense, packed = ({path.name for path in (folder / name).iterdir()} for name in tool.CARDS)
    assert (dense, packed) == (common | {"MODEL_CARD.md"}, common)
    assert "Apache-2.0" in (folder / "smollm2-bf16/MODEL_CARD.md").read_text()
    for name in tool.CARDS:
        card = Card.beside(folder / name)
        assert card == Card(tool.CARD_TOKENS, *tool.CARDS[name])


def test_the_card_is_checked_against_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, text = folder / "smollm2-nf4", "the cat, the 12 hats of a thin man. " * 40
    dense = tool.dense_model(packed)
    tool.check_card(packed, text, dense)  # the card is of another text
    assert capsys.readouterr().out == ""
    once = choose_tokens(text, TextTokenizer.load(packed), None, COPY).ids
    losses = tool.losses(dense, once + once)
    for apart, fails in ((0.0, False), (0.001, True)):
        first, second = losses[:255].mean().item(), losses[256:].mean().item() + apart
        card = Card(hash_ids(once + once), first, second)
        monkeypatch.setattr(tool.Card, "beside", lambda folder, card=card: card)
        if fails:
            with pytest.raises(SystemExit, match="promises another nll_repeated"):
                tool.check_card(packed, text, dense)
        else:
            tool.check_card(packed, text, dense)
            assert capsys.readouterr().out.count("transformers") == 2


def test_digits_stay_alone_and_chats_have_special_tokens(folder: Path) -> None:
    tokenizer = TextTokenizer.load(folder / "smollm2-nf4")
    words = [TOKENS[token] for token in tokenizer.encode("the cat the 12")]
    assert words == ["the", "\u0120", "c", "a", "t", "\u0120the", "\u0120", "1", "2"]
    assert (tokenizer.bos_id, tokenizer.bos_by_default) == (1, False)
    assert tokenizer.render_chat([Message("user", "the cat")]) == "the cat"
    assert [TOKENS[token] for token in tokenizer.encode_chat("<|im_start|>a")[0]] == [WORDS[1], "a"]
    theirs = AutoTokenizer.from_pretrained(folder / "smollm2-nf4")
    assert theirs("the cat the 12")["input_ids"] == tokenizer.encode("the cat the 12")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match=r"found sha256 .* needed"):
        tool.find_gguf(tmp_path / "x.gguf", tmp_path)


def test_the_text_of_demo_real_is_the_one_that_its_source_describes() -> None:
    folder = Path(TOOLS) / "prose"
    text, source = (folder / "handbook.txt").read_bytes(), (folder / "SOURCE.md").read_text()
    assert hashlib.sha256(text).hexdigest() in source
    assert f"{len(text):,} bytes" in source
    assert len(headings(text.decode())) == 8
