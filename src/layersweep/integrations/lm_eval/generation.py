"""Answers of lm-eval's generate_until: contexts and arms in, tokens out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from layersweep.errors import InputError
from layersweep.generate.prompts import Prompt, answers
from layersweep.generate.request import Sampling, Steps
from layersweep.integrations.lm_eval.scoring import Ids
from layersweep.kv.arms import Arm
from layersweep.sweep.record import Progress

MAX_GEN_TOKS = 256  # where a task says nothing, as in lm-eval's HF backend
_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Context:
    """The tokens of a context to continue, and how."""

    ids: Ids
    sampling: Sampling

    def fitted(self, limit: int) -> Context:
        """Its last tokens, which leave room for the new ones, as lm-eval's HF backend cuts it.
        Raises InputError where there is no room for a context."""
        room = limit - self.sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"lm-eval: found max_gen_toks {self.sampling.max_new_tokens}, needed fewer than "
                f"the {limit} tokens of the longest text",
                hint="a smaller max_gen_toks in the task's generation_kwargs",
            )
        return replace(self, ids=self.ids[-room:])


def sampling_of(kwargs: Mapping[str, Any], eos: str | None) -> Sampling:
    """The generation_kwargs of a task, with the defaults of lm-eval's HF backend: greedy, 256
    tokens, `until` and the end token's text stop. Raises InputError for one that is not known."""
    asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs), MAX_GEN_TOKS))
    until = handle_stop_sequences(asked.pop("until"), eos=eos)
    tokens, do_sample = asked.pop("max_gen_toks"), asked.pop("do_sample")
    if asked.get("num_beams") == 1:
        del asked["num_beams"]
    unknown = sorted(set(asked) - set(_SAMPLED))
    if unknown:
        raise InputError(
            f"lm-eval: found {', '.join(unknown)} in a task's generation_kwargs, needed until, "
            f"max_gen_toks, do_sample, {', '.join(_SAMPLED)}",
            hint="leave it out of the task",
        )
    return Sampling(
        max_new_tokens=tokens,
        do_sample=do_sample,
        stop=tuple(stop for stop in until if stop),
        **(asked if do_sample else {"repetition_penalty": asked.get("repetition_penalty", 1.0)}),
    )


def numbered(contexts: Sequence[Context]) -> list[Context]:
    """With seeds: the n-th time that a context is asked for has seed n. Greedy ones stay alike."""
    asked: Counter[Context] = Counter()
    found = []
    for one in contexts:
        if one.sampling.do_sample:
            seed = asked[one]
            asked[one] += 1
            found.append(replace(one, sampling=replace(one.sampling, seed=seed)))
        else:
            found.append(one)
    return found


def generate(
    steps: Steps, contexts: Sequence[Context], arms: Sequence[Arm], progress: Progress
) -> tuple[list[list[list[int]]], dict[int, str]]:
    """Tokens after each context under each arm, [context][arm], and what went wrong under which
    arm. All of them are asked for at once, so that a walk over the weights serves all."""
    prompts = [
        Prompt(str(index), "lm-eval", one.ids, one.sampling) for index, one in enumerate(contexts)
    ]
    distinct = {arm.name: arm for arm in arms}  # two may be the same where a cache grows
    tokens: list[dict[str, list[int]]] = [{} for _ in contexts]
    errors: dict[str, str] = {}
    total = len(prompts) * len(distinct)
    for done, answer in enumerate(answers(steps, prompts, list(distinct.values())), start=1):
        tokens[int(answer.prompt.id)][answer.arm.name] = answer.ids
        if answer.error is not None:
            errors.setdefault(answer.arm.name, answer.error)
        progress("answers", done, total)
    found = [[of[arm.name] for arm in arms] for of in tokens]
    ill = {place: errors[arm.name] for place, arm in enumerate(arms) if arm.name in errors}
    return found, ill
