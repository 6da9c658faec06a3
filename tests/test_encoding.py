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
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from layersweep.errors import BudgetError, InputError
from layersweep.text import encoding
from layersweep.text.encoding import EncodedText, encoding_bytes
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
    for name, value in {"PIECE": 512, "OVERLAP": 4, "ALIKE": 16}.items():
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


class Counting:
    """A tokenizer that notes how many characters it is given at once."""

    def __init__(self, kind: str) -> None:
        self.given: list[int] = []
        self.inner = tokenizer(kind)

    def encode_with_words(self, text: str) -> Encoding:
        self.given.append(len(text))
        return self.inner.encode_with_words(text)


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_is_long_in_a_text_of_words(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 2**13)
    text = demo_text(200_000)
    encoded = EncodedText(text, counting := Counting(kind))  # type: ignore[arg-type]
    encoded.reach(None)
    assert encoded.ids.tolist() == tokenizer(kind).encode(text)
    assert max(counting.given) <= 2**14
    assert sum(counting.given) < 1.2 * len(text)


@pytest.mark.parametrize("tight", [False, True], ids=["words", "no blank"])
def test_a_long_text_is_encoded_as_far_as_it_is_asked_for(tight: bool) -> None:
    text = demo_text(200_000)
    text = 20 * ("".join(text.split()) if tight else text)
    encoded = EncodedText(text, counting := Counting("bytes"))  # type: ignore[arg-type]
    encoded.reach(192)
    assert counting.given == [encoding.PIECE] * 2
    assert len(encoded.ids) > 192
    assert not encoded.complete


def test_a_head_is_of_the_texts_tokens_that_end_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 2**13)
    encoded = EncodedText(demo_text(100_000), tokenizer("bytes"))
    text, starts, ends = encoded.head(30_000)
    offsets = tokenizer("bytes").encode_with_offsets(demo_text(100_000))[1]
    expected = [(start, end) for start, end in offsets if end <= 30_000]
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == expected
    assert text == demo_text(30_000)
    assert not encoded.complete
    text, starts, _ = encoded.head(10**6)
    assert (len(text), len(starts), encoded.complete) == (100_000, len(offsets), True)


def _never_alike(monkeypatch: pytest.MonkeyPatch, small: int) -> EncodedText:
    for name, value in {"PIECE": 512, "SMALL_TEXT": small}.items():
        monkeypatch.setattr(encoding, name, value)
    monkeypatch.setattr(encoding, "_find_joint", lambda piece, following: None)
    return EncodedText(demo_text(5_000), tokenizer("bytes"))


def test_where_pieces_never_agree_a_small_text_is_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = _never_alike(monkeypatch, small=5_000)
    encoded.reach(10)
    assert encoded.ids.tolist() == tokenizer("bytes").encode(demo_text(5_000))
    with pytest.raises(InputError, match="found no place to cut it in characters 0 to 4096"):
        _never_alike(monkeypatch, small=4_999).reach(10)


def test_memory_is_bounded_and_refused_before_it_is_taken() -> None:
    pieces = 2 * 2**16 * 4 * 600
    assert encoding_bytes(30 * 10**6, 192) == 30 * 10**6 + (192 + 2**17) * 72 + pieces
    assert encoding_bytes(30 * 10**6, None) == 30 * 10**6 * 73 + pieces
    text = "word " * 10**6
    few = EncodedText(text, tokenizer("bytes"), available=400 * 2**20)
    few.reach(192)
    with pytest.raises(BudgetError, match=r"--ram: available 400\.00 MiB, needed 648\.09 MiB"):
        few.reach(None)
    EncodedText("word " * 100, tokenizer("bytes"), available=2**20).reach(None)
