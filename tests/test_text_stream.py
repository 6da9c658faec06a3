"""Streamed text: it adds up to the tokenizer's own text, and nothing given out is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from builders_tokenizer import load_kind
from hypothesis import given, settings
from hypothesis import strategies as st

import layersweep
from layersweep.text.streaming import TextStream
from layersweep.text.tokenizer import TextTokenizer

# The demo model's tokenizer, bytes, SentencePiece with byte fallback.
KINDS = ("demo", "bytes", "sentencepiece")
WILD = "Grüße, 世界 🙂🙃 नमस्ते\n\tx  y ﷺ e\u0301"


@cache
def tokenizer_of(kind: str) -> TextTokenizer:
    if kind == "demo":
        return TextTokenizer.load(Path(layersweep.__file__).parent / "demo/model")
    return load_kind(kind)


def pieces(
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    stop: Sequence[str] = (),
    after: Sequence[int] = (),
) -> list[str]:
    stream = TextStream(tokenizer, stop, after)
    return [*(stream.push(id) for id in ids), stream.finish()]


def whole(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    return tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True)


# Ids from all over the vocabulary, past its end, and, more often, of single bytes.
random_ids = st.lists(st.integers(0, 800) | st.integers(3, 260), max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(random_ids, random_ids)
def test_pieces_of_any_ids_add_up(kind: str, ids: list[int], prompt: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)
    prompt += tokenizer.encode("word a")  # whole characters, as a prompt that was a text has
    continued = whole(tokenizer, prompt) + "".join(pieces(tokenizer, ids, after=prompt))
    assert continued == whole(tokenizer, prompt + ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_stop_strings_end_the_text_where_they_are_complete_first(
    kind: str, text: str, stops: list[str]
) -> None:
    """Wherever tokens begin and end; the oracle reads character by character."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text + WILD)
    full = whole(tokenizer, ids)
    stops = [*stops, full[2:4]]
    ends = [end for end in range(len(full) + 1) if full[:end].endswith(tuple(stops))]
    read = full[: ends[0]]
    expected = min(read.removesuffix(stop) for stop in stops if read.endswith(stop))
    assert "".join(pieces(tokenizer, ids, stops)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_only_whole_characters_are_given_out(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    given = pieces(tokenizer, tokenizer.encode(WILD))
    assert "".join(given) == WILD and "�" not in "".join(given)
    assert given.count("") > 10  # the inner bytes of a character


def test_a_token_is_given_out_at_once_where_nothing_can_change_it() -> None:
    tokenizer = tokenizer_of("bytes")
    given = pieces(tokenizer, tokenizer.encode("the end of it"), stop=["\n", "END"])
    assert all(given[:-1]) and given[-1] == ""


def test_half_a_character_is_shown_at_the_end_as_the_tokenizer_shows_it() -> None:
    for kind, shown in (("bytes", "a�"), ("sentencepiece", "a��")):
        tokenizer = tokenizer_of(kind)
        ids = tokenizer.encode("a🙃")
        cut = ids[: -2 if kind == "sentencepiece" else -1]
        assert "".join(pieces(tokenizer, cut)) == whole(tokenizer, cut) == shown


def test_a_stop_string_across_tokens_is_held_back_and_never_seen() -> None:
    tokenizer = tokenizer_of("bytes")
    stream = TextStream(tokenizer, ["<END>"])
    given = [stream.push(id) for id in tokenizer.encode("x<EN y<E<END>z")]
    assert "".join(given) == "x<EN y<E" and stream.stopped
    assert given[1:3] == ["", ""]  # "<E" may yet become the stop
    assert (stream.push(tokenizer.encode("a")[0]), stream.finish()) == ("", "")


def test_of_two_stops_in_one_token_the_one_that_is_complete_first_counts() -> None:
    tokenizer = tokenizer_of("bytes")
    [token] = tokenizer.encode(" and")
    assert pieces(tokenizer, [token], ["d", "n"]) == [" a", ""]


def test_what_began_like_a_stop_comes_out_at_the_end() -> None:
    tokenizer = tokenizer_of("bytes")
    assert "".join(pieces(tokenizer, tokenizer.encode("x<EN"), ["<END>"])) == "x<EN"


def test_special_and_unknown_tokens_have_no_text() -> None:
    for kind in ("bytes", "sentencepiece"):
        tokenizer = tokenizer_of(kind)
        [word], end = tokenizer.encode("a")[-1:], tokenizer.tokenizer.token_to_id("</s>")
        assert pieces(tokenizer, [word, end, 10**6, word])[1:3] == ["", ""]


def test_a_first_word_keeps_its_blank_only_where_it_continues_a_text() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    prompt, ids = tokenizer.encode("in"), tokenizer.encode("the end")
    assert "".join(pieces(tokenizer, ids)) == "the end"
    assert "".join(pieces(tokenizer, ids, after=prompt)) == " the end"
    bytes_alone = tokenizer.encode("🙃")[1:]
    assert "".join(pieces(tokenizer, bytes_alone, after=tokenizer.encode("a🙂"))) == "🙃"


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_decoded_with_few_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the work grows with the text, not with its square."""
    tokenizer, most = tokenizer_of(kind), 0
    decode = TextTokenizer.decode

    def counted(self: TextTokenizer, ids: Sequence[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return decode(self, ids)

    monkeypatch.setattr(TextTokenizer, "decode", counted)
    ids = tokenizer.encode("some words, and 世 again. " * 200)
    assert "".join(pieces(tokenizer, ids)) == "some words, and 世 again. " * 200
    assert most <= 5  # three bytes of a character, the tokens before and after them
