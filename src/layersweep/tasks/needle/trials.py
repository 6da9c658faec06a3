"""Needle-in-a-haystack trials in the wording of RULER's niah tasks.

A trial is a text of `context` tokens:

    intro  haystack ... needle ... haystack  |  question  answer prefix  answer
    `------------- prefix_ids -------------'    `---------- branch_ids ----------'

The prefix is what a KV arm quantizes. The question is in the branch, so that every answer
token, the first one too, is predicted through the arm's cache.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from layersweep.errors import InputError
from layersweep.tasks.needle.words import (
    ADJECTIVES,
    ANSWER,
    ANSWER_PREFIX,
    INTRO,
    NEEDLE,
    NOUNS,
    QUESTION,
)
from layersweep.text.bos import BosMode, resolve_bos
from layersweep.text.chat import Message
from layersweep.text.encoding import SMALL_TEXT, EncodedText

FILL_TOLERANCE = 32  # a trial has context - 32 to context tokens, its answer included

_FILL_TARGET = 8  # aim this far below the context: re-tokenizing moves the count by a few
_FILL_ATTEMPTS = 12
_CLEAN_STARTS = 50
_REACH = 0.05  # of the haystack: how far a needle may move to find the end of a sentence
_GOLDEN = (math.sqrt(5) - 1) / 2
_USER_TEXT = "layersweep-user-text"
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_LINE_END = re.compile(r"(?=\n)")
_BLANK = re.compile(r"(?=\s)")


@dataclass(frozen=True)
class Trial:
    """One needle. `depth` is asked for, `achieved_depth` the share of the haystack's own
    tokens that stand before the needle, `haystack` its characters [begin, end) of the text. The
    last `answer_length` of `branch_ids` are the answer."""

    id: int
    context: int
    depth: float
    achieved_depth: float
    key: str
    answer: str
    haystack: tuple[int, int]
    prefix_ids: tuple[int, ...]
    branch_ids: tuple[int, ...]
    answer_length: int


def make_trials(
    encoded: EncodedText,
    *,
    contexts: Sequence[int],
    depths: Sequence[float],
    per_depth: int,
    keys: int,
    bos: BosMode,
    seed: int,
    max_context: int,
    count_limit: int | None = None,
) -> list[Trial]:
    """`per_depth` trials for every context and depth, or the first `count_limit` of them.

    All depths come once, then all once more, so that the first trials cover every depth. A
    trial depends only on the seed and its index. Raises InputError for settings that cannot
    be met: a context above `max_context` (the model's limit), too little text, ... Haystacks come
    from the first SMALL_TEXT characters.
    """
    _check_settings(contexts, depths, per_depth, keys, max_context, count_limit)
    builder = _Builder(encoded, keys, bos, seed)
    settings = [(c, d) for _ in range(per_depth) for c in contexts for d in depths]
    return [
        builder.trial(index, context, depth)
        for index, (context, depth) in enumerate(settings[:count_limit])
    ]


def generated_correctly(output_text: str, answer: str) -> bool:
    """Whether the first maximal run of digits in `output_text` is the answer."""
    found = re.search(r"[0-9]+", output_text)
    return found is not None and found[0] == answer


@dataclass(frozen=True)
class _Plan:
    """What a trial drew: everything but how much haystack fills the context."""

    keys: tuple[str, ...]  # the first one is asked for
    values: tuple[str, ...]
    depths: tuple[float, ...]
    question: str
    answer_prefix: str
    answer: str


@dataclass(frozen=True)
class _Filled:
    """A trial's text with `count` haystack tokens, encoded."""

    text: str
    question_at: int
    achieved_depth: float
    haystack: tuple[int, int]
    ids: list[int]
    offsets: list[tuple[int, int]]


class _Builder:
    """Trials of one text: a haystack is a range of its tokens, of which `starts` and `ends` are
    the characters."""

    def __init__(self, encoded: EncodedText, keys: int, bos: BosMode, seed: int) -> None:
        self.tokenizer, self.keys, self.bos, self.seed = encoded.tokenizer, keys, bos, seed
        self.bos_id = resolve_bos(self.tokenizer, bos)
        self.text, self.starts, self.ends = encoded.head(SMALL_TEXT)
        if len(self.text) < len(encoded.text):
            encoded.notes.append(f"needles are hidden in its first {SMALL_TEXT} characters")
        self.chat = self.tokenizer.chat_template is not None
        self.head, self.tail = self._chat_frame() if self.chat else ("", "")
        self.phase = random.Random(f"{seed}").random()

    def trial(self, index: int, context: int, depth: float) -> Trial:
        rng = random.Random(f"{self.seed}:{index}")
        plan = self._draw(rng, depth)
        overhead = len(self._fill(plan, 0, 0).ids)
        wanted = context - _FILL_TARGET - overhead
        if wanted < context // 2:
            raise InputError(
                f"--niah-context {context}: found {overhead} tokens of question and needles, "
                "needed at least half of the context for the haystack",
                hint=f"use --niah-context {2 * (overhead + _FILL_TARGET)} or more, "
                "or fewer --niah-keys",
            )
        first = self._haystack_start(index, context, wanted)
        filled = self._fill_context(plan, first, wanted, context)
        return self._split(index, context, depth, plan, filled)

    def _draw(self, rng: random.Random, depth: float) -> _Plan:
        """Distinct keys and 7-digit values, none of them in the text, and where they go."""
        keys: list[str] = []
        values: list[str] = []
        while len(keys) < self.keys:
            key = f"{_pick(rng, ADJECTIVES)}-{_pick(rng, NOUNS)}"
            if key not in keys and key not in self.text:
                keys.append(key)
        while len(values) < self.keys:
            value = str(10**6 + int(rng.random() * 9 * 10**6))
            if value not in values and value not in self.text:
                values.append(value)
        others = self.keys - 1
        spread = [(slot + rng.random()) / others for slot in range(others)]
        return _Plan(
            keys=tuple(keys),
            values=tuple(values),
            depths=(depth, *spread),
            question=QUESTION.format(key=keys[0]),
            answer_prefix=ANSWER_PREFIX.format(key=keys[0]),
            answer=ANSWER.format(value=values[0]),
        )

    def _haystack_start(self, index: int, context: int, wanted: int) -> int:
        """First token of the haystack: another place for every trial, at a line's start.

        Multiples of the golden ratio spread any number of trials evenly over the text.
        """
        last = len(self.starts) - wanted - FILL_TOLERANCE
        if last < 0:
            raise InputError(
                f"--niah-context {context}: found {len(self.starts)} tokens of text, needed "
                f"{wanted + FILL_TOLERANCE} for the haystack",
                hint="use a longer --text FILE or a smaller --niah-context",
            )
        for attempt in range(_CLEAN_STARTS):
            place = (self.phase + (index + attempt / _CLEAN_STARTS) * _GOLDEN) % 1.0
            first = self._line_start(int(place * (last + 1)), last)
            hay = self.text[self.starts[first] : self.ends[first + wanted + FILL_TOLERANCE - 1]]
            if not (self.chat and self.tokenizer.holds_special(hay)):
                return first
        raise InputError(
            f"--niah-context {context}: found the chat template's special tokens all over the "
            "text, needed a haystack without them",
            hint="use another --text FILE",
        )

    def _line_start(self, token: int, last: int) -> int:
        """The first token that starts a line at or after `token`, up to `last`, else `token`."""
        line_end = self.text.find("\n", self.starts[token], self.starts[last])
        found = bisect_left(self.starts, line_end + 1) if line_end >= 0 else token
        return found if found <= last else token

    def _fill_context(self, plan: _Plan, first: int, wanted: int, context: int) -> _Filled:
        """Add or take haystack tokens until the whole has context - 32 to context tokens."""
        count = wanted
        for _ in range(_FILL_ATTEMPTS):
            filled = self._fill(plan, first, count)
            total = len(filled.ids)
            if context - FILL_TOLERANCE <= total <= context:
                return filled
            count += context - _FILL_TARGET - total
            count = max(1, min(count, len(self.starts) - first))
        raise InputError(
            f"--niah-context {context}: found {total} tokens after {_FILL_ATTEMPTS} attempts, "
            f"needed {context - FILL_TOLERANCE} to {context}",
            hint="use a longer --text FILE or another --niah-context",
        )

    def _fill(self, plan: _Plan, first: int, count: int) -> _Filled:
        """The trial's whole text with the `count` text tokens from `first`, and its ids."""
        begin = int(self.starts[first]) if count else 0
        hay = self.text[begin : self.ends[first + count - 1]] if count else ""
        places = [self._needle_place(hay, first, count, depth) for depth in plan.depths]
        pieces, last = [], 0
        needles = sorted(zip(places, plan.keys, plan.values, strict=True))
        for place, key, value in needles:
            pieces += [hay[last:place], " ", NEEDLE.format(key=key, value=value)]
            last = place
        before = self.head + INTRO + "".join(pieces) + hay[last:]
        text = before + plan.question + self.tail + plan.answer_prefix + plan.answer
        ids, offsets = self._encode(text)
        tokens_before = bisect_left(self.starts, begin + places[0], first, first + count) - first
        achieved, haystack = tokens_before / max(1, count), (begin, begin + len(hay))
        return _Filled(text, len(before), achieved, haystack, ids, offsets)

    def _needle_place(self, hay: str, first: int, count: int, depth: float) -> int:
        """Where in `hay` a needle goes: the sentence end nearest its depth, within reach;
        else the nearest line end, else a blank, else the very place."""
        if not hay:
            return 0
        begin = self.starts[first]

        def place_of(tokens: float) -> int:
            token = first + min(count - 1, max(0, round(tokens)))
            return int(self.starts[token] - begin)

        target = len(hay) if depth >= 1 else place_of(depth * count)
        low = place_of((depth - _REACH) * count)
        high = place_of((depth + _REACH) * count) if depth + _REACH < 1 else len(hay)
        for pattern in (_SENTENCE_END, _LINE_END, _BLANK):
            # a little beyond `high`, for the blank that makes a full stop a sentence end
            ends = [m.end() for m in pattern.finditer(hay, low, high + 1) if m.end() <= high]
            if ends:
                return min(ends, key=lambda end: abs(end - target))
        return target

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids with at most one BOS. A chat template may spell its own: `auto` keeps that."""
        if not self.chat:
            ids, offsets = self.tokenizer.encode_with_offsets(text)
            bos_id = self.bos_id
        else:
            ids, offsets = self.tokenizer.encode_chat(text)
            own = 0
            while own < len(ids) and ids[own] == self.tokenizer.bos_id:
                own += 1
            ids, offsets = ids[own:], offsets[own:]
            bos_id = self.tokenizer.bos_id if own and self.bos == "auto" else self.bos_id
        if bos_id is None:
            return ids, offsets
        return [bos_id, *ids], [(0, 0), *offsets]

    def _split(self, index: int, context: int, depth: float, plan: _Plan, filled: _Filled) -> Trial:
        """Cut at the question; the answer is what follows the tokens common to the text with
        and without it."""
        # a token that straddles the start of the question belongs to the branch
        cut = next(i for i, (_, end) in enumerate(filled.offsets) if end > filled.question_at)
        unanswered = self._encode(filled.text[: -len(plan.answer)])[0]
        common = 0
        for ours, theirs in zip(filled.ids, unanswered, strict=False):
            if ours != theirs:
                break
            common += 1
        return Trial(
            id=index,
            context=context,
            depth=depth,
            achieved_depth=filled.achieved_depth,
            key=plan.keys[0],
            answer=plan.values[0],
            haystack=filled.haystack,
            prefix_ids=tuple(filled.ids[:cut]),
            branch_ids=tuple(filled.ids[cut:]),
            answer_length=len(filled.ids) - common,
        )

    def _chat_frame(self) -> tuple[str, str]:
        """What the chat template puts before and after the user's text."""
        rendered = self.tokenizer.render_chat([Message("user", _USER_TEXT)])
        if rendered.count(_USER_TEXT) != 1:
            raise InputError(
                f"chat template: found the user's text {rendered.count(_USER_TEXT)} times in "
                "what it renders, needed it once",
                hint="repair chat_template in tokenizer_config.json, or remove it",
            )
        head, tail = rendered.split(_USER_TEXT)
        return head, tail


def _pick(rng: random.Random, words: Sequence[str]) -> str:
    # random() alone is guaranteed to give the same numbers in every Python version
    return words[int(rng.random() * len(words))]


def _check_settings(
    contexts: Sequence[int],
    depths: Sequence[float],
    per_depth: int,
    keys: int,
    max_context: int,
    count_limit: int | None,
) -> None:
    if not contexts or min(contexts) < 1:
        raise InputError(
            f"--niah-context: found {list(contexts)}, needed one or more token counts above 0",
            hint="for example --niah-context 4096",
        )
    if max(contexts) > max_context:
        raise InputError(
            f"--niah-context: found {max(contexts)}, needed at most {max_context}, "
            "the model's limit",
            hint=f"use --niah-context {max_context} or less",
        )
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(
            f"--niah-depths: found {list(depths)}, needed one or more numbers from 0 to 1",
            hint="for example --niah-depths 0.1,0.5,0.9",
        )
    limit = 1 if count_limit is None else count_limit
    for option, found in (("--niah-per-depth", per_depth), ("the number of needles", limit)):
        if found < 1:
            raise InputError(f"{option}: found {found}, needed 1 or more", hint="use 1 or more")
    if not 1 <= keys <= 64:
        raise InputError(
            f"--niah-keys: found {keys}, needed 1 to 64 needles", hint="for example --niah-keys 4"
        )
