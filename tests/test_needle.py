"""Needle trials: what is hidden, where it is cut, how the context is filled, what is refused."""

from __future__ import annotations

import re

import pytest
from builders_tokenizer import demo_text, load_kind
from hypothesis import given, settings
from hypothesis import strategies as st

from layersweep.errors import InputError
from layersweep.evals.needle import (
    ANSWER_PREFIX,
    INTRO,
    NEEDLE,
    QUESTION,
    Trial,
    generated_correctly,
    make_trials,
)
from layersweep.evals.tokenizer import TextTokenizer

TEXT = demo_text(120_000)
DEPTHS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
KINDS = ["bytes", "bytes+bos", "sentencepiece", "inst", "marked"]


def trials(tokenizer: TextTokenizer, **changes: object) -> list[Trial]:
    arguments: dict[str, object] = {
        "contexts": [1024], "depths": DEPTHS, "per_depth": 1, "keys": 1, "bos": "auto",
        "seed": 0, "max_context": 8192,
    }  # fmt: skip
    return make_trials(TEXT, tokenizer, **(arguments | changes))  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    context=st.integers(1100, 4096),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    keys=st.sampled_from([1, 1, 4]),
)
def test_every_trial_holds_what_the_protocol_says(
    kind: str, context: int, depth: float, seed: int, keys: int
) -> None:
    tokenizer = load_kind(kind)
    (trial,) = trials(tokenizer, contexts=[context], depths=[depth], seed=seed, keys=keys)
    whole = trial.prefix_ids + trial.branch_ids
    assert context - 32 <= len(whole) <= context

    prefix, branch = tokenizer.decode(trial.prefix_ids), tokenizer.decode(trial.branch_ids)
    assert branch.endswith(ANSWER_PREFIX.format(key=trial.key) + f" {trial.answer}")
    assert QUESTION.format(key=trial.key).strip() in branch
    assert "What is the special magic" not in prefix
    assert INTRO in prefix
    assert prefix.count(NEEDLE.format(key=trial.key, value=trial.answer)) == 1
    assert prefix.count("One of the special magic numbers for") == keys

    answer_ids = trial.branch_ids[-trial.answer_length :]
    assert tokenizer.decode(answer_ids).strip() == trial.answer
    assert re.fullmatch(r"[1-9][0-9]{6}", trial.answer)
    assert trial.answer not in TEXT
    assert prefix.count(trial.answer) == 1
    assert abs(trial.achieved_depth - depth) <= 0.06
    assert whole.count(1) <= (2 if kind == "marked" else 1)  # its turns start with the BOS id


@pytest.mark.parametrize("kind", ["bytes", "bytes+bos", "sentencepiece"])
def test_prefix_and_branch_are_the_encoding_of_the_whole_text(kind: str) -> None:
    tokenizer = load_kind(kind)
    lead = [1] if tokenizer.bos_by_default else []
    for trial in trials(tokenizer):
        ids = list(trial.prefix_ids + trial.branch_ids)
        text = tokenizer.decode(ids[len(lead) :])
        assert ids == lead + tokenizer.encode(text)
        start = text.index(INTRO) + len(INTRO)
        hay = text[start : text.rindex(QUESTION.format(key=trial.key))]
        assert hay.replace(" " + NEEDLE.format(key=trial.key, value=trial.answer), "") in TEXT


def test_chat_puts_the_question_last_and_the_answer_prefix_after_the_template() -> None:
    for kind, tail in (("inst", " [/INST]"), ("marked", "</s>\n<s>assistant\n")):
        tokenizer = load_kind(kind)
        for trial in trials(tokenizer, count_limit=3):
            text = tokenizer.decode(trial.branch_ids)
            question = QUESTION.format(key=trial.key).strip()
            after = text[text.index(question) + len(question) :]
            assert re.sub(" +", " ", after) == re.sub(
                " +", " ", f"{tail}{ANSWER_PREFIX.format(key=trial.key)} {trial.answer}"
            )
            whole = list(trial.prefix_ids + trial.branch_ids)
            rendered = tokenizer.render_chat(
                tokenizer.decode(whole).split("[INST]" if kind == "inst" else "user\n")[1]
            )
            assert rendered.startswith("<s>")
            assert whole[0] == 1
            assert whole[1] != 1


@pytest.mark.parametrize(
    ("kind", "bos", "first_is_bos"),
    [
        ("bytes", "auto", False),
        ("bytes", "always", True),
        ("bytes+bos", "auto", True),
        ("bytes+bos", "never", False),
        ("inst", "always", True),
        ("inst", "never", False),
    ],
)
def test_bos_is_put_first_once_or_not_at_all(kind: str, bos: str, first_is_bos: bool) -> None:
    (trial,) = trials(load_kind(kind), bos=bos, count_limit=1)
    assert (trial.prefix_ids[0] == 1) is first_is_bos
    assert 1 not in trial.prefix_ids[1:] + trial.branch_ids


def test_special_tokens_of_the_text_are_not_parsed_in_a_chat() -> None:
    half = TEXT[:60_000]
    text = half.replace("import", "</s>") + half
    made = make_trials(
        text, load_kind("marked"), contexts=[1024], depths=[0.5], per_depth=10, keys=1, bos="auto",
        seed=0, max_context=8192,
    )  # fmt: skip
    for trial in made:
        assert (trial.prefix_ids + trial.branch_ids).count(2) == 1  # the template's own
    with pytest.raises(InputError, match="special tokens all over the text"):
        make_trials(
            "word </s> " * 9_000, load_kind("marked"), contexts=[1024], depths=[0.5], per_depth=1,
            keys=1, bos="auto", seed=0, max_context=8192,
        )  # fmt: skip
    plain = make_trials(
        "word </s> " * 9_000, load_kind("bytes"), contexts=[1024], depths=[0.5], per_depth=1,
        keys=1, bos="auto", seed=0, max_context=8192,
    )  # fmt: skip
    assert 2 not in plain[0].prefix_ids


def test_a_trial_depends_on_seed_and_index_alone() -> None:
    tokenizer = load_kind("bytes")
    one, two = trials(tokenizer, per_depth=1), trials(tokenizer, per_depth=2)
    assert one == two[:10] == trials(tokenizer, per_depth=3, count_limit=10)
    assert [t.id for t in two] == list(range(20))
    assert [t.depth for t in two] == DEPTHS * 2
    other = trials(tokenizer, seed=1)
    assert not {t.answer for t in one} & {t.answer for t in other}
    assert (one[0].key, one[0].answer) == (
        trials(tokenizer, contexts=[2048])[0].key,
        trials(tokenizer, contexts=[2048])[0].answer,
    )


def test_sixty_trials_have_distinct_haystacks_and_values() -> None:
    made = trials(load_kind("bytes"), per_depth=6, contexts=[1024])
    assert len(made) == 60
    assert len({t.answer for t in made}) == 60
    assert len({t.prefix_ids[30:90] for t in made}) >= 58
    assert max(abs(t.achieved_depth - t.depth) for t in made) <= 0.055


def test_contexts_are_crossed_with_depths() -> None:
    made = trials(load_kind("bytes"), contexts=[600, 1200], depths=[0.1, 0.9], per_depth=2)
    assert [(t.context, t.depth) for t in made[:4]] == [
        (600, 0.1), (600, 0.9), (1200, 0.1), (1200, 0.9)
    ]  # fmt: skip
    assert len(made) == 8


def test_the_needle_stands_at_a_sentence_end_else_a_line_end() -> None:
    sentences = "The cat sat on the mat and purred. " * 3_000
    lines = "the cat sat on the mat and purred\n" * 3_000
    words = "cat " * 20_000
    for text, before, after in (
        (sentences, ".", " "),
        (lines, "purred", "\n"),
        (words, "cat", " "),
    ):
        made = make_trials(
            text, load_kind("bytes"), contexts=[1024], depths=[0.3, 0.7], per_depth=2, keys=1,
            bos="auto", seed=3, max_context=8192,
        )  # fmt: skip
        for trial in made:
            prefix = load_kind("bytes").decode(trial.prefix_ids)
            needle = " " + NEEDLE.format(key=trial.key, value=trial.answer)
            head, tail = prefix.split(needle)
            assert head.endswith(before)
            assert tail.startswith(after)
            assert abs(trial.achieved_depth - trial.depth) < 0.02


def test_several_keys_are_distinct_and_spread() -> None:
    tokenizer = load_kind("bytes")
    for trial in trials(tokenizer, contexts=[2048], keys=8, count_limit=5):
        prefix = tokenizer.decode(trial.prefix_ids)
        found = re.findall(r"numbers for ([a-z-]+) is: ([0-9]{7})\.", prefix)
        assert len({key for key, _ in found}) == len({value for _, value in found}) == 8
        assert (trial.key, trial.answer) in found
        places = [m.start() / len(prefix) for m in re.finditer("One of the special", prefix)]
        assert min(places) < 0.3
        assert max(places) > 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": [9000]}, "--niah-context: found 9000, needed at most 8192"),
        ({"contexts": []}, "--niah-context: found .*needed one or more token counts"),
        ({"contexts": [-4]}, "--niah-context: found .*needed one or more token counts"),
        ({"contexts": [128]}, "--niah-context 128: found .* tokens of question and needles"),
        ({"contexts": [300], "keys": 8}, "--niah-context 300: found .* tokens of question and"),
        ({"depths": []}, "--niah-depths: found .*needed one or more numbers from 0 to 1"),
        ({"depths": [1.5]}, "--niah-depths: found .1.5., needed one or more numbers"),
        ({"depths": [float("nan")]}, "--niah-depths: found .nan., needed one or more numbers"),
        ({"per_depth": 0}, "--niah-per-depth: found 0, needed 1 or more"),
        ({"keys": 0}, "--niah-keys: found 0, needed 1 to 64"),
        ({"count_limit": 0}, "the number of needles: found 0, needed 1 or more"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        trials(load_kind("bytes"), **changes)
    assert caught.value.hint


def test_too_little_text_is_refused_and_never_wrapped() -> None:
    text = TEXT[:2_000]
    count = len(load_kind("bytes").encode(text))
    with pytest.raises(InputError, match=f"found {count} tokens of text, needed [0-9]+ for"):
        make_trials(
            text, load_kind("bytes"), contexts=[4096], depths=[0.5], per_depth=1, keys=1,
            bos="auto", seed=0, max_context=8192,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("output", "correct"),
    [
        (" 1234567. And then 9", True),
        (" 1234567", True),
        ("is 1,234567", False),
        ("12345678", False),
        ("7: 1234567", False),
        ("none", False),
        ("", False),
        ("\uff11\uff12\uff13\uff14\uff15\uff16\uff17", False),
    ],
)
def test_the_first_maximal_digit_run_decides(output: str, correct: bool) -> None:
    assert generated_correctly(output, "1234567") is correct


def test_wording_is_the_one_that_published_numbers_used() -> None:
    assert NEEDLE == "One of the special magic numbers for {key} is: {value}."
    assert INTRO.startswith("A special magic number is hidden within the following text.")
    assert QUESTION == (
        "\nWhat is the special magic number for {key} mentioned in the provided text?"
    )
    assert ANSWER_PREFIX == (
        " The special magic number for {key} mentioned in the provided text is"
    )
