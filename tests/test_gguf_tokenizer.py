"""Tokenizers in GGUF files: the ids of the tokenizer.json that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from builders_tokenizer import CHAT_TEMPLATE, demo_text, train_byte_level, train_sentencepiece
from gguf_convert import write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from layersweep.errors import InputError
from layersweep.generate.config import GenerationConfig
from layersweep.generate.request import Sampling
from layersweep.text.bos import resolve_bos
from layersweep.text.tokenizer import TextTokenizer

TEXTS = (
    demo_text(20_000),
    "a</s>b <s> <unk>",
    "  two  spaces\n\n\ttab\r\n x   ",
    "Größe naïve 日本語 e\u0301 12345 I'll DON'T ½ \U0001f600 <0x41> \u2581 \x00",
    "",
    " ",
)
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def tokenizer_file(path: Path, tokenizer: Tokenizer, model: str, **fields: Any) -> Path:
    """What llama.cpp's converter makes of a tokenizer whose tokens 0 to 2 are <unk>, <s>, </s>."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    ranks = {"".join(merge): -float(rank) for rank, merge in reversed([*enumerate(merges)])}
    kinds = [NORMAL if number > 2 else CONTROL for _, number in vocabulary]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list([token for token, _ in vocabulary])
    if model == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_tokenizer_pre("smollm")
    else:
        writer.add_token_scores([ranks.get(token, -1e4) for token, _ in vocabulary])
        kinds = [BYTE if token.startswith("<0x") else kind
                 for (token, _), kind in zip(vocabulary, kinds, strict=True)]  # fmt: skip
        kinds[0] = UNKNOWN
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in fields.items():
        add = {
            bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32,
            float: writer.add_float32,
        }[type(value)]  # fmt: skip
        name = name.replace("__", ".")
        add(name if name.startswith("general") else f"tokenizer.{name}", value)
    write(writer)
    return path


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextTokenizer, Tokenizer]:
    """As read from GGUF, and what it was made from."""
    path = tmp_path_factory.mktemp("tokenizer") / "model.gguf"
    original = train_byte_level() if request.param == "gpt2" else train_sentencepiece()
    read = TextTokenizer.load(tokenizer_file(path, original, request.param))
    expected = Tokenizer.from_str(original.to_str())
    expected.encode_special_tokens = True
    return read, expected


def same(both: tuple[TextTokenizer, Tokenizer], text: str) -> None:
    read, original = both
    expected = original.encode(text, add_special_tokens=False)
    ids, offsets = read.encode_with_offsets(text)
    assert (ids, offsets) == (expected.ids, expected.offsets)
    assert read.decode(ids) == original.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_those_of_the_original(both: tuple[TextTokenizer, Tokenizer], text: str) -> None:
    same(both, text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_ids_of_any_text(both: tuple[TextTokenizer, Tokenizer], text: str) -> None:
    same(both, text)


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        ("gpt2", {}, (1, None)),  # llama.cpp adds none to bytes where the file does not say
        ("gpt2", {"ggml__add_bos_token": True}, (1, 1)),
        ("llama", {}, (1, 1)),
        ("llama", {"ggml__add_bos_token": False}, (1, None)),
        ("llama", {"ggml__add_eos_token": True, "ggml__bos_token_id": 2}, (2, 2)),
    ],
)
def test_bos_and_template(
    model: str, fields: dict[str, Any], expected: tuple[int | None, ...], tmp_path: Path
) -> None:
    original = train_byte_level() if model == "gpt2" else train_sentencepiece()
    fields = {"chat_template": CHAT_TEMPLATE, **fields}
    read = TextTokenizer.load(tokenizer_file(tmp_path / "model.gguf", original, model, **fields))
    assert (read.bos_id, resolve_bos(read, "auto")) == expected
    assert read.chat_template == CHAT_TEMPLATE
    assert read.chat_tokens["eos_token"] == "</s>"
    ids, _ = read.encode_chat("<s>x</s>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert read.notes == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ggml__model": "t5"}, "tokenizer.ggml.model: found 't5', needed gpt2 or llama"),
        ({"ggml__pre": "mine"}, "tokenizer.ggml.pre: found 'mine', needed one of gpt-2"),
        ({"ggml__bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id: found 1000000, needed an id"),
        ({"ggml__add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token: found 'yes', needed true"),
        ({"chat_template": 3}, "tokenizer.chat_template: found 3, needed text"),
    ],
)
def test_what_is_not_known_is_refused_with_its_key(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tokenizer_file(tmp_path / "model.gguf", train_byte_level(), "gpt2", **change)
    with pytest.raises(InputError) as refusal:
        TextTokenizer.load(path)
    assert says in str(refusal.value) and "model.gguf" in str(refusal.value)


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    write(writer)
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.model: found None"):
        TextTokenizer.load(tmp_path / "model.gguf")


def test_a_text_ends_and_is_sampled_as_the_metadata_say(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "plain.gguf", train_byte_level(), "gpt2")
    assert GenerationConfig.read(path) == GenerationConfig(frozenset({2}))
    sampling = {"temp": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.25, "penalty_repeat": 1.5}
    fields = {f"general__sampling__{name}": value for name, value in sampling.items()}
    path = tokenizer_file(
        tmp_path / "model.gguf", train_byte_level(), "gpt2", ggml__eot_token_id=0, **fields
    )
    found = GenerationConfig.read(path)
    assert found.ends == {2, 0}
    assert found.sampling == Sampling(
        do_sample=True, temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, repetition_penalty=1.5
    )
