"""Needle trials: what is hidden, where it is cut, how the context is filled, what is refused."""

from __future__ import annotations

import hashlib
import math
import re

import pytest
import torch
from builders_tokenizer import demo_text, load_kind
from hypothesis import given, settings
from hypothesis import strategies as st

from layersweep.checkpoint.layout import demo_folder
from layersweep.errors import InputError
from layersweep.kv.arms import parse_arms
from layersweep.tasks.needle.summary import summarize_needle
from layersweep.tasks.needle.task import NeedleTask
from layersweep.tasks.needle.trials import (
    ANSWER_PREFIX,
    INTRO,
    NEEDLE,
    QUESTION,
    Trial,
    generated_correctly,
    make_trials,
)
from layersweep.tasks.settings import EvalSettings
from layersweep.text.chat import Message
from layersweep.text.encoding import EncodedText
from layersweep.text.tokenizer import TextTokenizer

TEXT = demo_text(120_000)
DEPTHS = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
KINDS = ["bytes", "bytes+bos", "sentencepiece", "inst", "marked"]


def trials(tokenizer: TextTokenizer, **changes: object) -> list[Trial]:
    arguments: dict[str, object] = {
        "contexts": [1024], "depths": DEPTHS, "per_depth": 1, "keys": 1, "bos": "auto",
        "seed": 0, "max_context": 8192,
    }  # fmt: skip
    return make_trials(EncodedText(TEXT, tokenizer), **(arguments | changes))  # type: ignore[arg-type]


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
    begin, end = trial.haystack
    hay = re.sub(r" One of the special magic numbers for \S+ is: \d+\.", "", prefix)
    assert TEXT[begin:end].startswith(hay.partition(INTRO)[2])
    assert len(hay.partition(INTRO)[2]) > end - begin - 20  # the last token may be in the branch

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
            said = tokenizer.decode(whole).split("[INST]" if kind == "inst" else "user\n")[1]
            rendered = tokenizer.render_chat([Message("user", said)])
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


def test_the_demos_trials_are_those_of_its_text_encoded_at_once() -> None:
    """The digest is of trials made before texts were encoded in pieces."""
    tokenizer = TextTokenizer.load(demo_folder())
    made = make_trials(
        EncodedText(demo_text(10**6), tokenizer),
        contexts=[1024, 2048], depths=[0.0, 0.25, 0.5, 1.0], per_depth=2, keys=3, bos="auto",
        seed=7, max_context=8192,
    )  # fmt: skip
    alike = re.sub(r"haystack=\(\d+, \d+\), ", "", repr(made))  # trials did not know theirs then
    digest = hashlib.sha256(alike.encode()).hexdigest()
    assert digest.startswith("539a0ab1801997a8")


def test_needles_of_a_long_text_are_hidden_in_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("text.encoding", "tasks.needle.trials"):
        monkeypatch.setattr(f"layersweep.{module}.SMALL_TEXT", len(TEXT))
    tokenizer = load_kind("bytes")
    encoded = EncodedText(TEXT + demo_text(700_000)[300_000:], tokenizer)
    made = make_trials(
        encoded, contexts=[1024], depths=DEPTHS, per_depth=2, keys=1, bos="auto", seed=0,
        max_context=8192,
    )  # fmt: skip
    assert encoded.notes == ["needles are hidden in its first 120000 characters"]
    assert not encoded.complete
    haystacks = [tokenizer.decode(trial.prefix_ids).split(INTRO)[1] for trial in made]
    places = [TEXT.find(haystack[:60]) for haystack in haystacks]
    assert min(places) >= 0
    assert max(places) > 90_000


def test_special_tokens_of_the_text_are_not_parsed_in_a_chat() -> None:
    half = TEXT[:60_000]
    text = half.replace("import", "</s>") + half
    made = make_trials(
        EncodedText(text, load_kind("marked")),
        contexts=[1024], depths=[0.5], per_depth=10, keys=1, bos="auto",
        seed=0, max_context=8192,
    )  # fmt: skip
    for trial in made:
        assert (trial.prefix_ids + trial.branch_ids).count(2) == 1  # the template's own
    with pytest.raises(InputError, match="special tokens all over the text"):
        make_trials(
            EncodedText("word </s> " * 9_000, load_kind("marked")),
            contexts=[1024], depths=[0.5], per_depth=1,
            keys=1, bos="auto", seed=0, max_context=8192,
        )  # fmt: skip
    plain = make_trials(
        EncodedText("word </s> " * 9_000, load_kind("bytes")),
        contexts=[1024], depths=[0.5], per_depth=1,
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
            EncodedText(text, load_kind("bytes")),
            contexts=[1024], depths=[0.3, 0.7], per_depth=2, keys=1,
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
            EncodedText(text, load_kind("bytes")),
            contexts=[4096], depths=[0.5], per_depth=1, keys=1,
            bos="auto", seed=0, max_context=8192,
        )  # fmt: skip


OUTPUTS = {
    " 1234567": True,
    " 1234567. And then 9": True,
    "The special magic number is\n\n1234567": True,
    "x1234567y": True,
    "-1234567": True,  # a sign is no digit
    "1234567.0": True,
    "1234567 7654321": True,  # the first number counts
    "7654321 1234567": False,
    "7: 1234567": False,
    "1234568": False,
    "12345678": False,
    "01234567": False,
    "123456": False,  # cut off by the limit on new tokens
    "1234567123": False,
    "1 234 567": False,
    "1,234,567": False,
    "is 1,234567": False,
    "1_234_567": False,
    "1234 567": False,
    "123\u200b4567": False,  # a space of no width splits, too
    "1.234567e6": False,
    "one million": False,
    "none": False,
    "": False,
    "\uff11\uff12\uff13\uff14\uff15\uff16\uff17": False,  # fullwidth digits are not the answer's
    "\u0661\u0662\u0663 1234567": True,  # nor do they begin a run of digits
    "123\uff14567": False,
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_first_maximal_digit_run_decides(output: str) -> None:
    assert generated_correctly(output, "1234567") is OUTPUTS[output]


class Words:
    """A tokenizer of four words."""

    def decode(self, ids: list[int]) -> str:
        return " ".join("abcd"[i] for i in ids)


RIGHT = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.6, 0.1, 0.2], [0.05, 0.05, 0.8, 0.1]]  # the answer d b c
ONE_WRONG = [RIGHT[0], [0.5, 0.3, 0.1, 0.1], RIGHT[2]]
TIE_WON = [RIGHT[0], [0.1, 0.4, 0.1, 0.4], RIGHT[2]]  # of equals the lowest id is the argmax
TIE_LOST = [RIGHT[0], [0.4, 0.4, 0.1, 0.1], RIGHT[2]]
ALL_WRONG = [[0.7, 0.1, 0.1, 0.1]] * 3


def judge(branches: list[list[list[list[float]]]], arms: str) -> NeedleTask:
    """A teacher-forced job of one trial per entry: what each branch, exact first, predicts."""
    trials = [
        Trial(0, 64, 0.5, 0.5, "red-fox", "1234567", (999 * i, 999 * i + 60), (0, 1),
              (2, 0, 3, 1, 2), answer_length=3)
        for i in range(len(branches))
    ]  # fmt: skip
    job = NeedleTask(
        trials=trials, arms=parse_arms(arms), tokenizer=Words(),  # type: ignore[arg-type]
        settings=EvalSettings(niah_contexts=(64,)),
    )  # fmt: skip
    (tile,) = job.tiles()
    for number, predictions in enumerate(branches):
        # a constant added to all logits of a position changes no probability
        logits = [torch.tensor(rows).log() + 7.0 for rows in predictions]
        job.read(tile, number, tile.sequences[number], [(slice(0, 2), logits)])
    job.settle()
    return job


def test_teacher_forcing_reads_the_rows_that_predict_the_answer() -> None:
    job = judge([[RIGHT, RIGHT]], "lloyd:K3V2")
    sequence = job.tiles()[0].sequences[0]
    assert [branch.ids for branch in sequence.branches] == [(2, 0, 3, 1, 2)] * 2
    # the row of token 0 predicts 3, the row of 3 predicts 1, the row of 1 predicts 2
    assert [branch.read for branch in sequence.branches] == [(1, 4)] * 2


def test_teacher_forcing_is_right_only_where_every_answer_token_is_the_first_guess() -> None:
    arms = "lloyd:K4V4,lloyd:K3V3,lloyd:K2V2,lloyd:K3V2"
    job = judge([[RIGHT, ONE_WRONG, TIE_WON, TIE_LOST, ALL_WRONG]], arms)
    names = ["exact", *arms.split(",")]
    assert [job.numbers.correct[name] for name in names] == [
        [True],
        [False],
        [True],
        [False],
        [False],
    ]
    outputs = [["d b c"], ["d a c"], ["d b c"], ["d a c"], ["a a a"]]
    assert [job.numbers.outputs[name] for name in names] == outputs
    # -ln of the answer's probabilities, mean over its three tokens: products 0.4 x 0.6 x 0.8, ...
    products = [0.192, 0.4 * 0.3 * 0.8, 0.4 * 0.4 * 0.8, 0.4 * 0.4 * 0.8, 0.1**3]
    for name, product in zip(names, products, strict=True):
        assert job.numbers.answer_nll[name] == [pytest.approx(-math.log(product) / 3, abs=1e-6)]


def test_eight_hand_made_trials_add_up() -> None:
    """exact finds all; the arm loses six of eight, each for 0.231 nats a token."""
    job = judge([[RIGHT, RIGHT]] * 2 + [[RIGHT, ONE_WRONG]] * 6, "lloyd:K3V2")
    section = summarize_needle(job.numbers.measurements(seed=0))
    exact, arm = section["arms"]
    assert section["baseline_gate"] == "passed"
    assert (exact["correct"], arm["correct"], arm["n"]) == (8, 2, 8)
    assert exact["wilson95"] == pytest.approx([0.6756, 1.0], abs=1e-4)  # 8 / (8 + 3.8415)
    assert arm["wilson95"] == pytest.approx([0.0715, 0.5907], abs=1e-4)
    assert (arm["lost"], arm["gained"], arm["p_flip"]) == (6, 0, pytest.approx(1 / 64))
    # ln(0.6 / 0.3) / 3 in six of eight, 0 in two; sd sqrt(0.75 x 0.25 x 8 / 7), over sqrt(8)
    step = math.log(2) / 3
    assert arm["answer_nll_delta"] == pytest.approx(0.75 * step, abs=1e-6)
    assert arm["answer_nll_sem"] == pytest.approx(math.sqrt(0.75 * 0.25 / 7) * step, abs=1e-6)


def test_an_arm_can_gain_needles_and_a_baseline_can_fail() -> None:
    job = judge([[RIGHT, ALL_WRONG]] + [[ALL_WRONG, RIGHT]] * 4, "lloyd:K3V2")
    section = summarize_needle(job.numbers.measurements(seed=0))
    exact, arm = section["arms"]
    assert section["baseline_gate"] == "failed"
    assert (exact["correct"], arm["correct"], arm["lost"], arm["gained"]) == (1, 4, 1, 4)
    assert arm["p_mcnemar_iid"] == pytest.approx(2 * (1 + 5) / 32)


def test_wording_is_the_one_that_published_numbers_used() -> None:
    assert NEEDLE == "One of the special magic numbers for {key} is: {value}."
    assert INTRO.startswith("A special magic number is hidden within the following text.")
    assert QUESTION == (
        "\nWhat is the special magic number for {key} mentioned in the provided text?"
    )
    assert ANSWER_PREFIX == (
        " The special magic number for {key} mentioned in the provided text is"
    )
