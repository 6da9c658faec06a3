"""Next tokens of a batch of sequences, chosen on the device; the host never waits for a number.

    logits [B, V] --penalty--> argmax ............................. greedy rows
                      '--> temperature, top-k, top-p, min-p --> cdf --> sampled rows
    logits [B, V] --> logsumexp --> log-probabilities, broken rows

The order and the rules are those of transformers' logits processors. A sampled row inverts its
cumulative distribution at one uniform number, a hash of its seed and of how many tokens it has. So
neither its row nor its neighbours change its tokens. B: rows, V: vocabulary, R: sampled rows, N:
log-probabilities listed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.errors import InputError
from layersweep.generate.request import Sampling

MOST_LOGPROBS = 20  # as in OpenAI's interface
# SplitMix64 (Steele, Lea, Flood 2014): the step of its state, and the constants that mix it.
_STEP, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class Chosen:
    """One token per row, on the device.

    `ids` [B] int64. `logprobs` [B] float32: natural, of the logits as they came. `top_ids` and
    `top_logprobs` [B, N]: the likeliest first, N the most that a row asked for. `broken` [B] bool:
    NaN or inf kept the row from a choice; its id is 0. A logit of -inf forbids its token alone.
    """

    ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    broken: Tensor


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Raises InputError, naming the field, for a value that nothing can be chosen by."""
    s, most = sampling, min(MOST_LOGPROBS, vocab)
    rules = [
        ("max_new_tokens", s.max_new_tokens >= 1, "1 or more"),
        ("temperature", not s.do_sample or 0 < s.temperature < math.inf, "more than 0, and finite"),
        ("top_k", s.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", 0 < s.top_p <= 1, "more than 0 and at most 1"),
        ("min_p", 0 <= s.min_p <= 1, "0 to 1"),
        ("repetition_penalty", 0 < s.repetition_penalty < math.inf, "more than 0, and finite"),
        ("stop", all(s.stop), "strings of one character or more"),
        ("logprobs", 0 <= s.logprobs <= most, f"0 to {most}"),
    ]
    for name, holds, needed in rules:
        if not holds:
            hint = "for the likeliest token each time, turn do_sample off"
            raise InputError(
                f"{name}: found {getattr(s, name)!r}, needed {needed}",
                hint=hint if name == "temperature" else "",
            )


@dataclass
class _Row:
    """A sequence that runs: how it samples, its seed, and how many tokens it was given."""

    sampling: Sampling
    seed: int
    drawn: int


@dataclass(frozen=True)
class _Batch:
    """What the rows of a batch ask for, on the device; it holds until a row enters or leaves.

    `slots` [B], `penalty` [B, 1]; `sampled` [R]: which rows sample, `state` [R]: the state of their
    random numbers. The settings below are [R, 1]; None where no row asks for one. `most_k`: the
    largest top_k; `listed`: N.
    """

    slots: Tensor
    penalizes: bool
    penalty: Tensor
    sampled: Tensor | None
    state: Tensor
    temperature: Tensor
    top_k: Tensor | None
    most_k: int
    removed_p: Tensor | None
    min_p: Tensor | None
    listed: int


class Sampler:
    """Chooses tokens for the sequences that run, each in a slot below `slots`.

    It holds `slots` x `vocab` bytes on the device once a row has a repetition penalty.
    """

    def __init__(self, vocab: int, slots: int, device: torch.device) -> None:
        self.vocab, self.slots, self.device = vocab, slots, device
        self._rows: dict[int, _Row] = {}
        self._seen: Tensor | None = None  # [slots, V]: tokens of the prompt, and those chosen
        self._batch: tuple[tuple[int, ...], _Batch] | None = None

    @torch.inference_mode()
    def add(self, slot: int, sampling: Sampling, ids: Sequence[int], generated: int = 0) -> None:
        """Let a sequence in. `ids`: its prompt, with the last `generated` of them chosen earlier,
        where it was preempted. Call `check_sampling` first."""
        assert 0 <= slot < self.slots and slot not in self._rows, f"slot {slot} is not free"
        seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
        self._rows[slot], self._batch = _Row(sampling, seed, generated), None
        if sampling.repetition_penalty != 1.0:
            if self._seen is None:
                shape = self.slots, self.vocab
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            known = sorted({id for id in ids if id < self.vocab})  # the head may be the shorter
            seen = self._seen[slot].zero_()
            seen.index_fill_(0, self._upload(known, torch.int64), True)

    def remove(self, slot: int) -> None:
        """Let a sequence go."""
        del self._rows[slot]
        self._batch = None

    @torch.inference_mode()
    def choose(self, logits: Tensor, slots: Sequence[int]) -> Chosen:
        """The next token of the sequences in `slots`, from `logits` float32 [B, V], row by row."""
        batch = self._batch_of(tuple(slots))
        assert logits.shape == (len(slots), self.vocab), f"logits {tuple(logits.shape)}"
        total = logits.logsumexp(-1)
        broken = ~total.isfinite()
        seen = self._seen if batch.penalizes else None
        scores = logits if seen is None else penalized(logits, seen[batch.slots], batch.penalty)
        ids = scores.argmax(-1)
        if batch.sampled is not None:
            kept = _warp(scores[batch.sampled], batch)
            ids[batch.sampled], lost = _draw(kept, _uniform(batch.state))
            broken[batch.sampled] |= lost
        ids = ids.masked_fill(broken, 0)
        for slot in slots:
            self._rows[slot].drawn += 1
        if seen is not None:
            seen[batch.slots, ids] = True
        top = _likeliest(logits, batch.listed)
        return Chosen(
            ids=ids,
            logprobs=logits.gather(-1, ids[:, None])[:, 0] - total,
            top_ids=top,
            top_logprobs=logits.gather(-1, top) - total[:, None],
            broken=broken,
        )

    def _batch_of(self, slots: tuple[int, ...]) -> _Batch:
        if self._batch is None or self._batch[0] != slots:
            self._batch = slots, self._gather(slots)
        return self._batch[1]

    def _gather(self, slots: tuple[int, ...]) -> _Batch:
        rows = [self._rows[slot] for slot in slots]
        settings = [row.sampling for row in rows]
        sampled = [at for at, sampling in enumerate(settings) if sampling.do_sample]
        own = [settings[at] for at in sampled]
        states = [_state(rows[at].seed, rows[at].drawn) for at in sampled]
        most_k = min(self.vocab, max((s.top_k for s in own), default=0))
        # a sum of float32 is never below 0: rows that keep all lose nothing
        removed = [1 - s.top_p if s.top_p < 1 else -1.0 for s in own]
        penalties = [s.repetition_penalty for s in settings]
        return _Batch(
            slots=self._upload(slots, torch.int64),
            penalizes=any(penalty != 1.0 for penalty in penalties),
            penalty=self._upload(penalties)[:, None],
            sampled=self._upload(sampled, torch.int64) if sampled else None,
            state=self._upload(states, torch.int64),
            temperature=self._upload([s.temperature for s in own])[:, None],
            top_k=self._setting([min(s.top_k, most_k) for s in own], 0, torch.int64),
            most_k=most_k,
            removed_p=self._setting(removed, -1.0),
            min_p=self._setting([s.min_p for s in own], 0.0),
            listed=max((s.logprobs for s in settings), default=0),
        )

    def _setting(
        self, values: Sequence[float], neutral: float, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        if all(value == neutral for value in values):
            return None
        return self._upload(values, dtype)[:, None]

    def _upload(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """From pinned memory, since the host waits for a copy from any other."""
        host = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)


def penalized(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores of `seen` tokens [B, V] made less likely by `penalty` [B, 1] (CTRL, Keskar et al.
    2019): a negative one is multiplied by it, another divided."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _warp(scores: Tensor, batch: _Batch) -> Tensor:
    """Scores [R, V] at their temperature, -inf where a token is not kept."""
    scores = scores / batch.temperature
    if batch.top_k is not None:
        scores = keep_top_k(scores, batch.top_k, batch.most_k)
    if batch.removed_p is not None:
        scores = keep_top_p(scores, batch.removed_p)
    if batch.min_p is not None:
        scores = keep_min_p(scores, batch.min_p)
    return scores


def keep_top_k(scores: Tensor, top_k: Tensor, most: int) -> Tensor:
    """The `top_k` [R, 1] largest, and those as large as the last of them; 0 keeps all."""
    least = scores.topk(most, dim=-1).values.gather(-1, (top_k - 1).clamp(min=0))
    return scores.masked_fill((scores < least) & (top_k > 0), -math.inf)


def keep_top_p(scores: Tensor, removed: Tensor) -> Tensor:
    """Without the least likely tokens, as long as their probabilities come to at most `removed`
    [R, 1] = 1 - top_p; the likeliest stays, among equal ones that with the lowest id."""
    backward = scores.flip(-1)  # a stable sort then puts the lowest id last, where nothing drops
    ordered, order = backward.sort(dim=-1, stable=True)
    dropped = ordered.softmax(-1).cumsum(-1) <= removed
    dropped[:, -1] = False
    return scores.masked_fill(dropped.scatter(-1, order, dropped).flip(-1), -math.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Tokens with at least `min_p` [R, 1] of the likeliest one's probability."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(-1, True), -math.inf)


def _draw(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The ids [R] at which the cumulative probability passes `uniform` [R] in [0, 1), and which
    rows [R] have no such id: their logits are broken, or inf at so low a temperature."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    # float64: in float32 a sum of 100,000 weights moves with the order that a kernel adds in
    reached = weights.cumsum(-1, dtype=torch.float64)
    aim = uniform * reached[:, -1]
    ids = torch.searchsorted(reached, aim[:, None], right=True)[:, 0]
    return ids.clamp(max=scores.shape[-1] - 1), ~aim.isfinite()


def _likeliest(logits: Tensor, count: int) -> Tensor:
    """The ids [B, `count`] of the largest logits, among equal ones the lowest ids."""
    if count == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # of -0.0 those of 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    below = 2**32 - 1 - torch.arange(logits.shape[-1], device=logits.device)
    return (rising.long() * 2**32 + below).topk(count, dim=-1).indices


def _state(seed: int, drawn: int) -> int:
    """Of SplitMix64 after `drawn` numbers; close seeds start far from each other."""
    return _signed(_mixed(seed % 2**64) + drawn * _STEP)


def _mixed(state: int) -> int:
    state = ((state ^ (state >> 30)) * _MIX[0]) % 2**64
    state = ((state ^ (state >> 27)) * _MIX[1]) % 2**64
    return state ^ (state >> 31)


def _uniform(state: Tensor) -> Tensor:
    """The next numbers in [0, 1) of int64 states [R], which step on; float64 of 52 bits, so that a
    product with a sum stays below the sum."""
    state += _signed(_STEP)
    mixed = (state ^ _shifted(state, 30)) * _signed(_MIX[0])
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(_MIX[1])
    mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 12).double().mul(2.0**-52)


def _shifted(values: Tensor, by: int) -> Tensor:
    """Right, with zeros coming in: int64 has the bits of uint64, its shift keeps the sign."""
    return (values >> by).bitwise_and(2 ** (64 - by) - 1)


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
