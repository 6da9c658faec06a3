"""A model whose weights are swept, as an object for transformers' `generate` and `pipeline`.

    with as_transformers(layersweep.load("mixtral", vram="14GiB"), kv="K4V2") as model:
        model.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=64)
        pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon a time")

Sampling, logits processors, stopping criteria and streamers are transformers' own. A forward pass
is a walk over the weights, wherever they wait; each text of the batch is a text of its own, and
padding is left out of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from layersweep.errors import BudgetError, InputError
from layersweep.generate.room import MOST, check_arm, make_room, text_bytes
from layersweep.generate.walk import Passage, walk
from layersweep.integrations.transformers.texts import SweptCache
from layersweep.kv.arms import Arm, parse
from layersweep.kv.fit import Fit
from layersweep.sweep.model import Model
from layersweep.sweep.shapes import can_fit
from layersweep.text.bos import resolve_bos
from layersweep.text.reference import with_reference
from layersweep.text.tokenizer import TextTokenizer
from layersweep.units import format_bytes

# What an output calls the cache: past_key_values in older releases.
CACHE = {"cache", "past_key_values"} & {one.name for one in fields(CausalLMOutputWithPast)}
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def as_transformers(
    model: Model, kv: str = "exact", *, most: int = MOST, longest: int | None = None
) -> SweptForCausalLM:
    """`model` for transformers, with keys and values kept under the arm `kv`.

    It takes the memory of its plan until it is closed. `most`: texts of a batch; `longest`: tokens
    of one, padding left out, the model's limit by default. Raises InputError for an arm that is
    unknown or that cannot keep this model's keys and values, BudgetError for what cannot fit.
    """
    arm = parse(kv, growing=True)
    check_arm(model, arm)
    if arm.fits and can_fit(model.decoder):
        tokenizer = TextTokenizer.load(model.checkpoint.folder)
        model = with_reference(model, [arm], tokenizer, resolve_bos(tokenizer, "auto"))
    config = AutoConfig.from_pretrained(model.checkpoint.folder)
    # pipelines log an error for a class whose name is no architecture of transformers
    name = (config.architectures or [SweptForCausalLM.__name__])[0]
    kind: type[SweptForCausalLM] = type(name, (SweptForCausalLM,), {})
    return kind(model, arm, config, most, longest)


class SweptForCausalLM(GenerationMixin):  # type: ignore[misc]  # transformers has no types
    """See the module's text; `as_transformers` makes one.

    It is no torch module and has no parameters: `forward` is all that `generate` needs of a model,
    with a few attributes that say what it is.
    """

    main_input_name = "input_ids"
    input_modalities = "text"
    _is_stateful = False

    def __init__(self, model: Model, arm: Arm, config: Any, most: int, longest: int | None) -> None:
        self.model, self.arm, self.config = model, arm, config
        self.device, self.dtype = model.compute.device, model.compute.dtype
        self.hf_device_map = {"": self.device}  # a pipeline leaves the model where it is
        self.generation_config = _generation_config(model, config)
        self.room = make_room(model, most=most, longest=longest, every_row=True)
        self._fits: dict[int, Fit] = {}
        self._caches: weakref.WeakSet[SweptCache] = weakref.WeakSet()
        self._engine = self.room.open(model, model.say)
        self._closed = False

    def __repr__(self) -> str:
        return f"{SweptForCausalLM.__name__}({self.arm.name})\n{self.model!r}"

    def __enter__(self) -> SweptForCausalLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Let go of weights and memory. Caches that are left cannot go on."""
        if not self._closed:
            self._engine.close()
        self._closed = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: SweptCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        past_key_values: SweptCache | None = None,
        cache_position: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Read `input_ids` [B, T] behind what the cache has.

        `attention_mask` [B, tokens of the cache + T]: 0 for padding, on the left alone; positions
        count without it. `logits_to_keep`: columns whose logits are wanted, the last ones, 0 for
        all. `past_key_values` is the older name of `cache`; `cache_position`, which the first
        releases of transformers 5 pass, says what the cache knows. Logits are float32 [B, kept, V],
        zero for padding. Raises InputError for other arguments and padding, for a text that gets
        longer than `longest`, BudgetError for texts that are too much for the memory.
        """
        _refuse(
            inputs_embeds=inputs_embeds, labels=labels, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip
        if return_dict is False:
            raise InputError("return_dict: found False, needed True")
        if self._closed:
            raise InputError("forward: found a closed model, needed an open one")
        if input_ids is None or input_ids.ndim != 2:
            raise InputError("input_ids: found none, needed ids [texts, tokens]")
        held = self._cache(cache if cache is not None else past_key_values, len(input_ids))
        ids = held.new_tokens(input_ids, attention_mask)
        self._check(held, ids)
        columns = input_ids.shape[1]
        kept = columns if logits_to_keep == 0 else min(logits_to_keep, columns)
        shape = len(ids), kept, self.model.decoder.vocab_size
        logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self._read(held, ids, logits)
        held.columns += columns
        given = None if use_cache is False else held
        return CausalLMOutputWithPast(logits=logits, **dict.fromkeys(CACHE, given))

    __call__ = forward

    @torch.inference_mode()
    def _read(self, held: SweptCache, ids: Sequence[Sequence[int]], logits: Tensor) -> None:
        """All texts read their `ids`, as many at a time as a walk takes; `logits` [B, kept, V]."""
        done, kept = [0] * len(ids), logits.shape[1]
        while any(end < len(own) for end, own in zip(done, ids, strict=True)):
            passages, free = {}, self.room.rows
            for row, own in enumerate(ids):
                start, left = done[row], len(own) - done[row]
                done[row] += min(left, free)
                free -= done[row] - start
                if done[row] > start:
                    wanted = max(done[row] - max(start, len(own) - kept), 0)
                    passage = Passage(held.texts[row], tuple(own[start : done[row]]), wanted)
                    passages[passage] = row
            for passage in passages:
                held.running.make_room(passage.text, passage.text.end + len(passage.ids))
            walked = walk(self._engine, held.running, list(passages))
            for passage, found in walked.logits.items():
                row = passages[passage]
                stop = kept - (len(ids[row]) - done[row])
                logits[row, max(stop - passage.wanted, 0) : max(stop, 0)] = found

    def _cache(self, held: SweptCache | None, batch: int) -> SweptCache:
        """The one that was handed back, or an empty one."""
        if held is None:
            made = SweptCache(
                self.arm, self.model.decoder, batch, self.room.longest, self.device, self._fits
            )
            self._caches.add(made)
            return made
        if held not in self._caches:
            raise InputError(
                f"cache: found a {type(held).__name__}, needed one that this model made",
                hint="leave it out at first; as_transformers(model, kv=...) says what it keeps",
            )
        return held

    def _check(self, held: SweptCache, ids: Sequence[Sequence[int]]) -> None:
        """Raises InputError and BudgetError for texts that cannot be read."""
        vocab, room = self.model.decoder.vocab_size, self.room
        longest = max(text.end + len(own) for text, own in zip(held.texts, ids, strict=True))
        if longest > room.longest:
            raise InputError(
                f"input_ids: found a text of {longest} tokens, needed at most {room.longest}",
                hint="a shorter text, or a larger `longest` where the model allows it",
            )
        if len(ids) > room.most:
            raise InputError(
                f"input_ids: found {len(ids)} texts, needed at most {room.most}",
                hint="a smaller batch, or a larger `most`",
            )
        bad = {token for own in ids for token in own if not 0 <= token < vocab}
        if bad:
            raise InputError(
                f"input_ids: found token id {min(bad)}, needed ids from 0 to {vocab - 1}",
                hint="tokenize with this model's own tokenizer",
            )
        needed = sum(
            text_bytes(self.model, text, text.end + len(own))
            for text, own in zip(held.texts, ids, strict=True)
        )
        others = sum(cache.nbytes for cache in self._caches if cache is not held)
        if needed + others > room.kept_bytes:
            raise BudgetError(
                f"keys and values: available {format_bytes(room.kept_bytes - others)}, needed "
                f"{format_bytes(needed)} for {len(ids)} texts of up to {longest} tokens",
                hint="a smaller batch, a larger vram, or drop caches that are not needed any more",
            )

    # -- what transformers asks of a model ------------------------------------------------------

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str | None]:
        """Nothing to switch between prompts and steps."""
        return {}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`forward` makes the cache."""
        return False

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        """Before anything is read: raises InputError for what texts that only grow cannot do."""
        if generation_mode not in MODES:
            raise InputError(
                f"generate: found {generation_mode.value.replace('_', ' ')}, needed greedy search "
                "or sampling",
                hint="num_beams=1, and neither assistant_model nor prompt_lookup_num_tokens",
            )
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation: found '{generation_config.cache_implementation}', needed "
                "None",
                hint="as_transformers(model, kv=...) says what the cache keeps",
            )
        super()._validate_generation_mode(
            generation_mode, generation_config, generation_mode_kwargs
        )


def _generation_config(model: Model, config: Any) -> GenerationConfig:
    """The checkpoint's own; without a file what config.json says, as in transformers."""
    folder = model.checkpoint.folder
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _refuse(**given: object) -> None:
    """Raises InputError that names an argument which is there and must not be."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise InputError(
                f"{name}: found {'a tensor' if isinstance(value, Tensor) else value}, needed none: "
                "a swept model takes ids and gives logits",
                hint="transformers' own class of the model has the rest",
            )
