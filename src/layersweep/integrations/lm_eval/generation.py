"""Answers of lm-eval's generate_until, by a scheduler: prompts and arms in, tokens out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from layersweep.errors import InputError
from layersweep.generate.request import Request, Sampling, Steps
from layersweep.integrations.lm_eval.scoring import Ids
from layersweep.kv.arms import Arm
from layersweep.sweep.record import Progress

MAX_GEN_TOKS = 256  # where a task says nothing, as in lm-eval's HF backend
_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Prompt:
    """A context's tokens, and how it is continued."""

    ids: Ids
    sampling: Sampling

    def fitted(self, limit: int) -> Prompt:
        """The last tokens of the context that leave room for the new ones, as lm-eval's HF backend
        cuts it. Raises InputError where there is no room for a context."""
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


def numbered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """With seeds: the n-th time that a prompt is asked for has seed n. Greedy ones stay alike."""
    asked: Counter[Prompt] = Counter()
    found = []
    for prompt in prompts:
        if prompt.sampling.do_sample:
            asked[prompt] += 1
            seed = asked[prompt] - 1
            found.append(replace(prompt, sampling=replace(prompt.sampling, seed=seed)))
        else:
            found.append(prompt)
    return found


def generate(
    scheduler: Steps, prompts: Sequence[Prompt], arms: Sequence[Arm], progress: Progress
) -> tuple[list[list[list[int]]], dict[int, str]]:
    """Tokens of each prompt under each arm, [prompt][arm], and what went wrong under which arm.

    All of them are in the scheduler at once, so that a walk over the weights serves all.
    """
    requests = {
        f"{index} {place}": Request(f"{index} {place}", prompt.ids, prompt.sampling, arm)
        for index, prompt in enumerate(prompts)
        for place, arm in enumerate(arms)
    }
    for request in requests.values():
        scheduler.check(request)
    for request in requests.values():
        scheduler.submit(request)
    answers: list[list[list[int]]] = [[[] for _ in arms] for _ in prompts]
    ill: dict[int, str] = {}
    finished = 0
    while not scheduler.idle:
        for output in scheduler.step():
            index, place = map(int, output.request.split())
            if output.token is not None:
                answers[index][place].append(output.token)
            if output.error is not None:
                ill.setdefault(place, output.error)
            finished += output.finish is not None
        progress("answers", finished, len(requests))
    return answers, ill
