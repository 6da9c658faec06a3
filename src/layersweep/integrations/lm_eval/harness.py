"""One model under several arms, and every answer that it gave: computed once, for all arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from layersweep.errors import Fallback, GateError, InputError
from layersweep.generate.request import Sampling
from layersweep.generate.room import MOST, ROWS
from layersweep.generate.sampling import check_sampling
from layersweep.generate.scheduler import Scheduler
from layersweep.integrations.lm_eval.generation import Context, generate, numbered
from layersweep.integrations.lm_eval.scoring import EXACT_CACHE, HarnessArm, Score, Scored, score
from layersweep.study.fitting import arm_fallbacks, fitting_arms
from layersweep.sweep.generic_limits import KEEPS_NOTHING, check_modules
from layersweep.sweep.model import Model
from layersweep.sweep.record import Progress
from layersweep.sweep.shapes import length_limit
from layersweep.sweep.streams import every_stream
from layersweep.text.bos import resolve_bos
from layersweep.text.reference import with_reference
from layersweep.text.tokenizer import TextTokenizer

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context and of its continuation


@dataclass
class Harness:
    """A model, its arms, and what they answered. `tokenizer` is transformers', as in lm-eval's HF
    backend; ours finds stop strings. `max_length`: tokens of the longest text.

    `sweeps` over contexts and texts, `walks` that gave answers their tokens, and `bytes_read` of
    weights count what was done so far. `grew`: some of it read a cache as it grows. `ill`: arms
    whose numbers are not finite, and where.
    """

    model: Model
    arms: list[HarnessArm]
    tokenizer: Any
    text_tokenizer: TextTokenizer
    max_length: int
    say: Callable[[Fallback], None] = lambda fallback: None
    progress: Progress = lambda phase, done, total: None
    sweeps: int = 0
    walks: int = 0
    bytes_read: int = 0
    grew: bool = False
    ill: dict[HarnessArm, str] = field(default_factory=dict)
    _said: set[Fallback] = field(default_factory=set)
    _scores: dict[Scored, list[Score]] = field(default_factory=dict)
    _answers: dict[Context, list[list[int]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Model, arms: Sequence[HarnessArm], max_length: int | None = None,
        say: Callable[[Fallback], None] = lambda fallback: None,
    ) -> Harness:  # fmt: skip
        """Refuses what cannot work, before weights are read, and says what is simpler than wanted.

        Raises InputError for an arm that the model cannot have, a `max_length` that it cannot
        read, and a tokenizer that transformers cannot load.
        """
        decoder, compute = model.decoder, model.compute
        if model.beside:
            raise InputError(
                f"--device: found {1 + len(model.beside)} devices, needed one",
                hint=f"--device {compute.device}",
            )
        every = [arm for one in arms for arm in (one.whole, one.growing)]
        check_modules(decoder, every, generates=False)
        for arm in every:
            arm.check_model(decoder.num_hidden_layers, model.checkpoint.fingerprint)
        streams = every_stream(decoder)
        fitting, left_out = fitting_arms(every, streams, compute.device, compute.dtype)
        kept = [one for one in arms if one.whole in fitting and one.growing in fitting]
        limit, name = length_limit(decoder)
        if max_length is not None and not 1 < max_length <= limit:
            raise InputError(
                f"--max-length: found {max_length}, needed 2 to {limit}, the model's limit "
                f"({name} in config.json)",
                hint=f"--max-length {limit}",
            )
        own = TextTokenizer.load(model.checkpoint.folder)
        for fallback in (*left_out, *arm_fallbacks(fitting, decoder, compute.device)):
            say(fallback)
        model = with_reference(model, fitting, own, resolve_bos(own, "auto"))
        tokenizer = _tokenizer(model.checkpoint.folder)
        return cls(replace(model, say=say), kept, tokenizer, own, max_length or limit, say)

    def scores(self, pairs: Sequence[Pair], *, rolling: bool = False) -> list[list[Score]]:
        """Of each context's continuation under each arm, [pair][arm]; all pairs that were not asked
        for before go in one sweep. `rolling`: they are windows of texts.

        Contexts longer than `max_length` lose their beginning, as in lm-eval's HF backend, which
        is said. Raises InputError for a continuation that is longer or empty.
        """
        wanted = [Scored.of(*pair, self.max_length) for pair in pairs]
        if rolling:
            wanted = [one.rolling() for one in wanted]
        new = [one for one in dict.fromkeys(wanted) if one not in self._scores]
        if new:
            cut = sum(len(one) + len(other) > self.max_length + 1 for one, other in pairs)
            self._say_cut(cut, len(pairs), "their last tokens")
            self.grew = self.grew or any(one.grows for one in new)
            found = score(self.model, new, self.arms, self.progress)
            self._scores.update(zip(new, found.of, strict=True))
            self.sweeps += found.record.sweeps
            self.bytes_read += found.record.bytes_read
            self._mark(found.ill)
        return [self._scores[one] for one in wanted]

    def check_answers(self, task: str, sampling: Sampling) -> None:
        """Raises InputError where no answer of a task can be generated, before weights are read."""
        if self.model.decoder.generic is not None:
            raise InputError(KEEPS_NOTHING, hint=f"leave {task} out of --tasks")
        check_sampling(sampling, self.model.decoder.vocab_size)
        Context((0,), sampling).fitted(self.max_length)

    def answers(self, contexts: Sequence[Context]) -> list[list[list[int]]]:
        """New tokens after each context under each arm, [context][arm]; all that were not asked for
        before are generated together.

        A context that is sampled and asked for several times gets as many answers, which all arms
        draw by the same seeds. Contexts without room for their answer lose their beginning, as in
        lm-eval's HF backend, which is said. Raises InputError where there is no room at all.
        """
        fitted = [one.fitted(self.max_length) for one in contexts]
        wanted = numbered(fitted)
        new = [one for one in dict.fromkeys(wanted) if one not in self._answers]
        if new:
            cut = sum(one.ids != other.ids for one, other in zip(fitted, contexts, strict=True))
            self._say_cut(cut, len(contexts), "the last tokens that leave room for an answer")
            self.grew = True
            needed = max(len(one.ids) + one.sampling.max_new_tokens for one in new)
            longest = min(self.max_length, max(needed, ROWS))  # ROWS are read in one walk
            most = min(MOST, len(new) * len(self.arms))
            arms = [arm.growing for arm in self.arms]
            with Scheduler(
                self.model, self.text_tokenizer, arms=arms, most=most, longest=longest,
                say=self.say,
            ) as scheduler:  # fmt: skip
                answers, ill = generate(scheduler, new, arms, self.progress)
                self.walks += scheduler.counts.walks
                self.bytes_read += scheduler.counts.weight_bytes_read
            self._answers.update(zip(new, answers, strict=True))
            self._mark(ill)
        return [self._answers[one] for one in wanted]

    def say_once(self, fallback: Fallback) -> None:
        if fallback not in self._said:
            self._said.add(fallback)
            self.say(fallback)

    def _say_cut(self, cut: int, of: int, used: str) -> None:
        if cut:
            why = f"{cut} of {of} take more than the longest text, {self.max_length} tokens"
            self.say(Fallback("lm-eval's contexts", "all of them", used, why))

    def _mark(self, ill: Mapping[int, str]) -> None:
        """Arms that gave something that is not finite; GateError if the exact cache did."""
        for place, why in ill.items():
            if self.arms[place] == EXACT_CACHE:
                raise GateError(
                    f"lm-eval: the exact cache gives {why}",
                    hint="try --dtype bfloat16 or float32",
                )
            self.ill.setdefault(self.arms[place], why)


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder}: found no tokenizer that transformers reads ({why}), needed one, whose "
            "tokens lm-eval's HF backend has",
            hint="take the tokenizer files of the model's own repository",
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{folder}: found a tokenizer without an end token, needed one, which lm-eval puts "
            "before a text",
            hint="name an eos_token in tokenizer_config.json",
        )
    return tokenizer
