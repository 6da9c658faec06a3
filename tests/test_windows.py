"""Windows: no token dropped or doubled, BOS counted, too little text refused."""

from __future__ import annotations

import dataclasses
import struct
from hashlib import sha256
from pathlib import Path

import pytest
from builders_tokenizer import demo_text, save_tokenizer, train_byte_level
from hypothesis import given, settings
from hypothesis import strategies as st

from layersweep.errors import InputError
from layersweep.text.bos import resolve_bos
from layersweep.text.encoding import EncodedText
from layersweep.text.tokenizer import TextTokenizer, hash_ids
from layersweep.text.windows import cut_windows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(save_tokenizer(tmp_path_factory.mktemp("t"), train_byte_level()))


@settings(max_examples=40, deadline=None)
@given(
    characters=st.integers(2_000, 9_000),
    prefix=st.integers(1, 40),
    continuation=st.integers(2, 40),
    bos=st.sampled_from(["always", "never"]),
)
def test_windows_are_the_text_without_gap_or_overlap(
    tokenizer: TextTokenizer, characters: int, prefix: int, continuation: int, bos: str
) -> None:
    text = demo_text(characters)
    windows = cut_windows(
        EncodedText(text, tokenizer),
        segments=None,
        prefix=prefix,
        continuation=continuation,
        bos=bos,
    )
    lead = 1 if bos == "always" else 0
    assert all(len(w.ids) == prefix + continuation and w.prefix == prefix for w in windows)
    assert all(w.ids[:lead] == (1,) * lead for w in windows)
    rejoined = [token for w in windows for token in w.ids[lead:]]
    everything = tokenizer.encode(text)
    assert rejoined == everything[: len(rejoined)]
    assert len(everything) - len(rejoined) < prefix + continuation - lead
    assert [w.index for w in windows] == list(range(len(windows)))


def test_first_n_windows_are_the_same_whatever_n_is(tokenizer: TextTokenizer) -> None:
    lengths = {"prefix": 64, "continuation": 32, "bos": "auto"}
    few = cut_windows(EncodedText(demo_text(9_000), tokenizer), segments=3, **lengths)
    many = cut_windows(EncodedText(demo_text(9_000), tokenizer), segments=None, **lengths)
    assert len(few) == 3 < len(many)
    assert few == many[:3]


def test_windows_of_a_long_text_are_counted_if_all_are_asked_for(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = demo_text(300_000)
    lengths = {"prefix": 64, "continuation": 32, "bos": "never"}
    whole = cut_windows(EncodedText(text, tokenizer), segments=2, **lengths)
    assert whole[0].possible == len(tokenizer.encode(text)) // 96
    monkeypatch.setattr("layersweep.text.encoding.SMALL_TEXT", 200_000)
    few = cut_windows(EncodedText(text, tokenizer), segments=2, **lengths)
    assert [window.possible for window in few] == [None, None]
    assert [window.ids for window in few] == [window.ids for window in whole]
    every = cut_windows(EncodedText(text, tokenizer), segments=None, **lengths)
    assert every[0].possible == len(every) == whole[0].possible


def test_tokens_sha_is_over_little_endian_uint32(tokenizer: TextTokenizer) -> None:
    window = cut_windows(
        EncodedText(demo_text(2_000), tokenizer), segments=1, prefix=8, continuation=4, bos="always"
    )[0]
    assert window.tokens_sha == sha256(struct.pack("<12I", *window.ids)).hexdigest()
    assert window.tokens_sha == hash_ids(window.ids) != hash_ids(window.ids[::-1])


def test_article_is_the_heading_above_the_windows_first_token(tokenizer: TextTokenizer) -> None:
    text = "x " * 20 + "\n = One = \n" + "y " * 40 + "\n = = part = = \n" + "z " * 40
    text += "\n = Two = \n" + "w " * 40
    windows = cut_windows(
        EncodedText(text, tokenizer), segments=None, prefix=8, continuation=8, bos="never"
    )
    offsets = tokenizer.encode_with_offsets(text)[1]
    for window in windows:
        start = offsets[window.index * 16][0]
        after_one, after_two = start >= text.index(" = One"), start >= text.index(" = Two")
        assert window.article == ("Two" if after_two else "One" if after_one else None)
    assert windows[0].article is None
    assert {w.article for w in windows} == {None, "One", "Two"}


def test_the_demo_text_holds_the_standard_study_with_this_tokenizer(
    tokenizer: TextTokenizer,
) -> None:
    windows = cut_windows(
        EncodedText(demo_text(900_000), tokenizer),
        segments=80,
        prefix=1024,
        continuation=512,
        bos="auto",
    )
    assert len(windows) == 80
    assert sum(len(w.ids) - w.prefix - 1 for w in windows) == 80 * 511
    assert len({w.article for w in windows}) >= 8
    assert len({w.tokens_sha for w in windows}) == 80


def test_too_little_text_says_how_much_there_is(tokenizer: TextTokenizer) -> None:
    text = demo_text(3_000)
    count = len(tokenizer.encode(text))
    with pytest.raises(InputError) as caught:
        cut_windows(
            EncodedText(text, tokenizer), segments=80, prefix=64, continuation=36, bos="never"
        )
    possible = count // 100
    assert str(caught.value) == (
        f"--segments: found {count} tokens of text = {possible} windows of 64 + 36, needed 80"
    )
    assert caught.value.hint.startswith(f"use --segments {possible}, a longer --text FILE")


def test_not_one_window_is_refused_even_for_all(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match=r"= 0 windows of 64 [+] 36, needed at least 1"):
        cut_windows(
            EncodedText("short", tokenizer), segments=None, prefix=64, continuation=36, bos="never"
        )


@pytest.mark.parametrize(
    ("segments", "prefix", "continuation", "message"),
    [
        (0, 64, 36, "--segments: found 0, needed 1 or more"),
        (-3, 64, 36, "--segments: found -3, needed 1 or more"),
        (1, 0, 36, "--prefix: found 0, needed 1 or more tokens"),
        (1, 64, 1, "--continuation: found 1, needed 2 or more tokens"),
    ],
)
def test_impossible_lengths_are_refused(
    tokenizer: TextTokenizer, segments: int, prefix: int, continuation: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        cut_windows(
            EncodedText(demo_text(2_000), tokenizer),
            segments=segments,
            prefix=prefix,
            continuation=continuation,
            bos="never",
        )


def test_bos_is_resolved_once_for_all_protocols(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    puts = dataclasses.replace(tokenizer, bos_by_default=True)
    assert resolve_bos(tokenizer, "auto") is None
    assert resolve_bos(puts, "auto") == 1
    assert resolve_bos(tokenizer, "always") == 1
    assert resolve_bos(puts, "never") is None
    without = dataclasses.replace(tokenizer, bos_id=None)
    assert resolve_bos(without, "auto") is None
    with pytest.raises(InputError, match="--bos always: found a tokenizer without a BOS token"):
        resolve_bos(without, "always")
    with pytest.raises(InputError, match="--bos: found 'sometimes'"):
        resolve_bos(tokenizer, "sometimes")  # type: ignore[arg-type]
