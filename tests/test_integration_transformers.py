"""Codecs as transformers caches: the same numbers as our own streamed caches, and generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_builders import tiny_checkpoint
from oracle_models import oracle_model
from test_sweep import random_ids, sweep_logits

from layersweep.errors import InputError
from layersweep.integrations.transformers import cache_for
from layersweep.kv import parse
from layersweep.sweep.model import load
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile

ARMS = ["lloyd:K3V2", "lloyd:K2V16", "lloyd:K3V2@pb=1", "lloyd:K3V2@window=6", "exact"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", ["lloyd:K3V2", "lloyd:K2V16", "lloyd:K3V2@pb=1", "exact"])
def test_a_first_call_equals_a_streamed_sequence_of_the_sweep(name: str, tiny: Path) -> None:
    """Every token reads every earlier one and itself through the codec, in both."""
    ids = random_ids(60, 128, 3)
    ride = BranchedSequence((), (Branch(parse(name), ids, (0, 60), streaming=True),))
    ours = sweep_logits(load(str(tiny), device="cpu"), [Tile("t", (ride,))])[0][0][0]
    oracle = oracle_model(tiny)
    with torch.inference_mode():
        theirs = oracle(torch.tensor([ids]), past_key_values=cache_for(oracle, name)).logits[0]
    assert (ours - theirs).abs().max() < 1e-3
    # The codec is read on the first call, too (with pb, both of the two layers are protected).
    if name != "exact" and "pb" not in name:
        with torch.inference_mode():
            plain = oracle(torch.tensor([ids])).logits[0]
        assert (plain - theirs).abs().max() > 0.02


@pytest.mark.parametrize("name", ARMS)
def test_token_by_token_equals_one_call_where_nothing_waits(name: str, tiny: Path) -> None:
    oracle, ids = oracle_model(tiny), random_ids(20, 128, 4)
    cache = cache_for(oracle, name)
    with torch.inference_mode():
        steps = [
            oracle(torch.tensor([[token]]), past_key_values=cache).logits[0, 0] for token in ids
        ]
        whole = oracle(torch.tensor([ids]), past_key_values=cache_for(oracle, name)).logits[0]
    assert cache.get_seq_length() == 20
    if "window" not in name:  # in one call, early tokens have left the window that they stood in
        assert (torch.stack(steps) - whole).abs().max() < 1e-3


@pytest.mark.parametrize("name", ARMS)
def test_generate_runs_and_exact_is_plain_generation(name: str, tiny: Path) -> None:
    oracle, ids = oracle_model(tiny), torch.tensor([random_ids(12, 128, 5)] * 2)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = cache_for(oracle, name)
    found = oracle.generate(ids, past_key_values=cache, **options)
    assert found.shape[0] == 2 and 12 < found.shape[1] <= 20
    bits = cache.layers[0].bits_per_element
    if name == "exact":
        assert torch.equal(found, oracle.generate(ids, **options))
        assert bits == 16
    elif name == "lloyd:K3V2":
        assert bits < 4


def test_what_is_kept_holds_no_more_than_it_counts(tiny: Path) -> None:
    """Exact tokens are no views of the prompt, which would stay with them."""
    oracle, cache = oracle_model(tiny), cache_for(oracle_model(tiny), "lloyd:K3V2@window=6@sink=2")
    with torch.inference_mode():
        oracle(torch.tensor([random_ids(60, 128, 6)]), past_key_values=cache)
    for stream in cache.layers[0].store.arms[0]:
        for part, count in ((stream.head, 2), (stream.tail, 6)):
            assert part.shape[2] == count
            assert part.untyped_storage().nbytes() == part.nbytes


def test_models_that_cannot_be_served_are_refused(tiny: Path) -> None:
    with pytest.raises(InputError, match="rotary_emb"):
        cache_for(torch.nn.Linear(2, 2), "K3V2")
