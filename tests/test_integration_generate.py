"""A swept model in transformers' `generate` and `pipeline` gives what transformers' own gives."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.oracle import make, opened
from families.table import TINY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    TopKLogitsWarper,
    pipeline,
    pipelines,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from layersweep.environment import Budget
from layersweep.errors import BudgetError, InputError
from layersweep.integrations.transformers import (
    SweptForCausalLM,
    as_transformers,
    cache_for,
    cache_size,
)
from layersweep.sweep import loop
from layersweep.sweep.model import Model, load

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
LENGTHS = (3, 9, 1)
LONGEST, NEW = 128, 8
PADDED = {"pad_token_id": 0, "max_new_tokens": NEW}


@dataclass(frozen=True)
class Pair:
    """The same weights here and there. `ids` [3, 9] and `mask`: texts of LENGTHS, padded left."""

    model: Model
    swept: SweptForCausalLM
    theirs: Any
    ids: Tensor
    mask: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word per token."""
        words = {f"w{at}": at for at in range(self.model.decoder.vocab_size)}
        object_ = Tokenizer(WordLevel(words, unk_token="w1"))
        object_.pre_tokenizer = Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=object_, pad_token="w0", padding_side="left"
        )


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_oss", "mixtral"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    yield from paired(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from paired("llama", tmp_path_factory.mktemp("llama"))


def paired(kind: str, folder: Path) -> Iterator[Pair]:
    make(TINY[kind], folder)
    model = load(str(folder), device="cpu")
    vocab, drawn = model.decoder.vocab_size, torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocab, (len(LENGTHS), max(LENGTHS)), generator=drawn)
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    with as_transformers(model, most=8, longest=LONGEST) as swept:
        yield Pair(model, swept, opened(folder), ids * mask, mask)


def test_greedy_tokens_of_a_padded_batch(pair: Pair) -> None:
    found = pair.swept.generate(**pair.inputs, **PADDED, do_sample=False)
    assert torch.equal(found, pair.theirs.generate(**pair.inputs, **PADDED, do_sample=False))
    assert found.shape == (3, max(LENGTHS) + NEW)


def test_a_seed_draws_what_it_draws_there(llama: Pair) -> None:
    options = {
        **PADDED, "do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95,
        "repetition_penalty": 1.2, "num_return_sequences": 2,
    }  # fmt: skip
    found = []
    for model in (llama.swept, llama.theirs):
        torch.manual_seed(7)
        found.append(model.generate(**llama.inputs, **options))
    assert torch.equal(*found)
    assert found[0].shape[0] == 6 and not torch.equal(found[0][2], found[0][3])


def test_logits_of_every_token(pair: Pair) -> None:
    with torch.inference_mode():
        theirs = pair.theirs(**pair.inputs).logits
    found = pair.swept(**pair.inputs).logits
    seen = pair.mask.bool()
    assert (found - theirs)[seen].abs().max() < 1e-5 * theirs.abs().max()
    assert not found[~seen].any()
    found.add_(1)  # the caller's own memory


def test_logits_of_some_tokens_however_they_are_read(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 columns the last 4; 5 tokens go with a walk, 3 through the head at once."""
    whole = llama.swept(**llama.inputs).logits
    monkeypatch.setattr(llama.swept, "room", replace(llama.swept.room, rows=5))
    monkeypatch.setattr(loop, "positions_at_once", lambda branches, vocab: 3)
    for kept in (4, 0):
        cut = llama.swept(**llama.inputs, logits_to_keep=kept).logits
        assert cut.shape == (3, kept or 9, llama.model.decoder.vocab_size)
        assert (cut - whole[:, -kept:]).abs().max() < 1e-5 * whole.abs().max()


def test_a_cache_that_is_given_back_goes_on(llama: Pair) -> None:
    options = {**PADDED, "do_sample": False, "eos_token_id": None}
    whole = llama.theirs.generate(**llama.inputs, **{**options, "max_new_tokens": 2 * NEW})
    first = llama.swept.generate(**llama.inputs, **options, return_dict_in_generate=True)
    assert torch.equal(first.sequences, whole[:, :-NEW])
    mask = torch.cat((llama.mask, torch.ones(3, NEW, dtype=torch.long)), dim=1)
    cache = first[CACHE]
    assert cache.get_seq_length() == max(LENGTHS) + NEW - 1
    later = llama.swept.generate(first.sequences, attention_mask=mask, **{CACHE: cache}, **options)
    assert torch.equal(later, whole)
    assert cache_size(cache).tokens == sum(LENGTHS) + 3 * (2 * NEW - 1)
    assert cache_size(cache).bits_per_element == 16


def test_without_a_cache_every_token_reads_all(llama: Pair) -> None:
    options = {**PADDED, "do_sample": False}
    found = llama.swept.generate(**llama.inputs, **options, use_cache=False)
    assert torch.equal(found, llama.swept.generate(**llama.inputs, **options))


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamers_processors_and_stopping_criteria_are_theirs(llama: Pair) -> None:
    """The text stops behind its fifth new token, chosen among the two likeliest."""
    ids, streams, found = llama.ids[1:2], [Kept(), Kept()], []
    for model, streamer in zip((llama.swept, llama.theirs), streams, strict=True):
        torch.manual_seed(3)
        found.append(model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=50,
            eos_token_id=None, pad_token_id=0, streamer=streamer,
            logits_processor=[TopKLogitsWarper(2)],
            stopping_criteria=[lambda ids, scores: torch.full((1,), ids.shape[1] >= 14)],
        ))  # fmt: skip
    assert torch.equal(*found) and found[0].shape == (1, 14)
    assert streams[0].tokens == streams[1].tokens == [*found[0][0].tolist(), -1]


def test_a_pipeline_takes_it(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not log that it does not know the class."""
    monkeypatch.setattr(pipelines.base.logger, "error", pytest.fail)
    prompts = ["w5 w6 w7", "w9 w8 w30 w20 w11"]
    options = {"max_new_tokens": NEW, "do_sample": False, "batch_size": 2}
    of = [
        pipeline("text-generation", model=model, tokenizer=llama.tokenizer)(prompts, **options)
        for model in (llama.swept, llama.theirs)
    ]
    assert of[0] == of[1]
    assert isinstance(llama.swept, SweptForCausalLM)


@pytest.mark.parametrize("kv", ["lloyd:K3V2", "lloyd:K2V2@window=4@sink=2"])
def test_an_arm_gives_the_tokens_of_its_cache_in_transformers(kv: str, llama: Pair) -> None:
    """Of two texts of one length: there a cache codes padding, too."""
    ids, options = llama.ids[1:2].repeat(2, 1), {**PADDED, "do_sample": False}
    ids[1] = ids[1].flip(0)
    mask = torch.ones_like(ids)
    there = cache_for(llama.theirs, kv)
    theirs = llama.theirs.generate(ids, attention_mask=mask, **{CACHE: there}, **options)
    with as_transformers(llama.model, kv, most=2, longest=LONGEST) as swept:
        found = swept.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, theirs)
    assert not torch.equal(theirs, llama.swept.generate(ids, attention_mask=mask, **options))


def test_weights_that_stream_give_the_same(llama: Pair) -> None:
    assert llama.swept.room.plan.host == "resident"
    ram = Budget(llama.swept.room.plan.placement.host_ring + 2**10, "test")
    with as_transformers(replace(llama.model, ram=ram), most=8, longest=LONGEST) as swept:
        assert swept.room.plan.host != "resident"
        found = swept(**llama.inputs).logits
    assert torch.equal(found, llama.swept(**llama.inputs).logits)


def test_a_cache_that_is_dropped_frees_its_memory(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the kept one and another, which needs 15 % to spare."""
    gc.collect()
    kept = llama.swept(**llama.inputs)[CACHE]
    room = replace(llama.swept.room, kept_bytes=kept.nbytes * 5 // 2)
    monkeypatch.setattr(llama.swept, "room", room)
    for _ in range(3):
        llama.swept(**llama.inputs)
    with pytest.raises(BudgetError, match=r"needed .* for 6 texts of up to 9 tokens"):
        llama.swept(torch.cat((llama.ids, llama.ids)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "found beam search, needed greedy search or sampling"),
        ({"prompt_lookup_num_tokens": 3}, "found assisted generation, needed greedy"),
        ({"cache_implementation": "static"}, "cache_implementation: found 'static', needed None"),
        ({CACHE: DynamicCache()}, "cache: found a DynamicCache, needed one that this"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: found"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
)
def test_what_generate_cannot_do_is_refused(
    options: dict[str, Any], message: str, llama: Pair
) -> None:
    with pytest.raises(InputError, match=message):
        llama.swept.generate(**llama.inputs, **{**PADDED, "eos_token_id": None, **options})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": torch.ones(1, 2)}, "labels: found a tensor, needed none"),
        ({"inputs_embeds": torch.ones(1, 2, 64)}, "inputs_embeds: found a tensor, needed none"),
        ({"return_dict": False}, "return_dict: found False"),
        ({"input_ids": None}, "input_ids: found none"),
        ({"input_ids": torch.tensor([[5, 9999]])}, "found token id 9999, needed ids from 0 to"),
        ({"input_ids": torch.ones(1, 129).long()}, "a text of 129 tokens, needed at most 128"),
        ({"input_ids": torch.ones(9, 1).long()}, "found 9 texts, needed at most 8"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "text 0 has padding behind its first token"),
        ({"attention_mask": torch.tensor([[0, 0]])}, "needed the 0 of the cache and at least one"),
        ({"attention_mask": torch.ones(1, 3)}, r"found shape \[1, 3\], needed \[1, 2\]"),
    ],
)
def test_what_forward_cannot_read_is_refused(
    inputs: dict[str, Any], message: str, llama: Pair
) -> None:
    with pytest.raises(InputError, match=message):
        llama.swept(**{"input_ids": torch.tensor([[5, 6]]), **inputs})


def test_a_cache_takes_no_other_batch_and_no_other_mask(llama: Pair) -> None:
    cache = llama.swept(**llama.inputs)[CACHE]
    with pytest.raises(InputError, match="found 1 texts, needed the 3 of the cache"):
        llama.swept(llama.ids[:1, :1], cache=cache)
    with pytest.raises(InputError, match="text 0 has 9 tokens before 1 new ones, needed the 3"):
        llama.swept(llama.ids[:, :1], cache=cache)
    for ask in (cache.crop, cache.reorder_cache, cache.batch_repeat_interleave):
        with pytest.raises(InputError, match="needed texts that only grow"):
            ask(1)
    cache.reset()
    again = llama.swept(**llama.inputs, cache=cache)
    assert torch.equal(again.logits, llama.swept(**llama.inputs).logits)


def test_a_closed_model_says_so(llama: Pair) -> None:
    with as_transformers(llama.model, most=1, longest=LONGEST) as swept:
        swept.close()
    with pytest.raises(InputError, match="found a closed model"):
        swept(llama.ids)
