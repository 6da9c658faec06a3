"""A text encoded in pieces: its tokens are those of the whole, and memory does not grow with it."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from builders_tokenizer import (
    SPECIAL,
    demo_text,
    save_tokenizer,
    train_byte_level,
    train_sentencepiece,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from layersweep.text import encoding
from layersweep.text.encoding import EncodedText
from layersweep.text.tokenizer import TextTokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([demo_text(20_000)], trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=50))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([demo_text(20_000)], trainer)
    return tokenizer


def _pattern() -> Tokenizer:
    """Words by a pattern that looks ahead, digits in threes: the Llama 3 kind; tokens added."""
    tokenizer = Tokenizer.from_str(train_byte_level().to_str())
    pattern = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken("import", lstrip=True),
            AddedToken("self", rstrip=True, normalized=False),
            AddedToken("===", single_word=True),
        ]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    """As Llama 2 and Mistral are saved today: one word, however long the text is."""
    saved = json.loads(train_sentencepiece().to_str())
    tokenizer = Tokenizer.from_str(json.dumps(saved | {"normalizer": None}))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": train_byte_level,
    "pattern": _pattern,
    "sentencepiece": train_sentencepiece,
    "metaspace": _metaspace,
    "unigram": _unigram,
    "word piece": _word_piece,
}


@functools.cache
def tokenizer(kind: str) -> TextTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return TextTokenizer.load(save_tokenizer(Path(folder), KINDS[kind]()))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIECE": 512, "LONGEST_PIECE": 2**14, "OVERLAP": 4, "ALIKE": 16}.items():
        monkeypatch.setattr(encoding, name, value)


RUNS = st.builds(
    lambda text, times: text * times,
    st.one_of(
        st.text(min_size=1, max_size=4),
        st.sampled_from(
            ["a", " ", "\r\n", "\n\n", "ab", "7", "e\u0301", "=", "\u200d👩", " \t", "é"]
        ),
    ),
    st.integers(1, 1500),
)
CODE = st.builds(lambda at, size: demo_text(200_000)[at : at + size],
                 st.integers(0, 190_000), st.integers(0, 3000))  # fmt: skip
TIGHT = CODE.map(lambda text: "".join(text.split()))
TEXTS = st.lists(st.one_of(CODE, TIGHT, RUNS, st.text(max_size=300)), min_size=1, max_size=6)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=TEXTS)
def test_tokens_in_pieces_are_those_of_the_whole_text(kind: str, texts: list[str]) -> None:
    text = "".join(texts)
    encoded = EncodedText(text, tokenizer(kind))
    encoded.reach(None)
    ids, offsets = tokenizer(kind).encode_with_offsets(text)
    assert encoded.ids.tolist() == ids
    assert list(zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True)) == offsets
    assert encoded.complete
