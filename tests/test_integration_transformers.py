"""Codecs as transformers caches: the same numbers as our own streamed caches, and generation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cached_models import FIELDS, WINDOW, cached_model
from checkpoint_builders import tiny_checkpoint
from oracle_models import oracle_model
from test_sweep import random_ids, sweep_logits
from torch import Tensor
from transformers import AutoConfig, Cache, DynamicCache

from layersweep.errors import InputError, LayersweepWarning
from layersweep.integrations.transformers import cache_for, cache_size
from layersweep.kv import parse
from layersweep.kv.size import kv_size
from layersweep.kv.stored import StoredStream
from layersweep.kv.stream import State
from layersweep.sweep.model import load
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile

ARMS = ["lloyd:K3V2", "lloyd:K2V16", "lloyd:K3V2@pb=1", "lloyd:K3V2@window=6", "exact"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "name", ["lloyd:K3V2", "lloyd:K2V16", "lloyd:K3V2@pb=1", "lloyd:K1V1@layers=1", "exact"]
)
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


def test_coordinates_that_only_a_sweep_fits_are_said_to_be_missing(tiny: Path) -> None:
    with pytest.warns(LayersweepWarning, match="as with fit=0: only sweeps fit them"):
        cache_for(oracle_model(tiny), "K3V2")


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


def test_exact_tokens_stay_as_they_came_to_the_bit() -> None:
    """Nor does RoPE, undone and done again for the codec, round a sink or a recent token."""
    keys, values = torch.randn(2, 1, 2, 40, 16, generator=torch.Generator().manual_seed(7)).half()
    cache = cache_for(cached_model("llama"), "lloyd:K3V2@sink=3@window=5")
    cache.update(keys[:, :, :30], values[:, :, :30], 0)
    for found, given in zip(
        cache.update(keys[:, :, 30:], values[:, :, 30:], 0), (keys, values), strict=True
    ):
        kept = torch.ones(40, dtype=torch.bool)
        kept[3:35] = False
        assert torch.equal(found[:, :, kept], given[:, :, kept])
        assert not torch.equal(found[:, :, 3:35], given[:, :, 3:35])


def test_only_a_token_that_has_others_coded_decodes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 tokens behind 150, those that fill a block of 16; to the bit what decoding for each
    gives."""
    model, name = cached_model("llama"), "lloyd:K3V2@window=8@block=16@fine=96"
    decoded, count = StoredStream.decoded, 0

    def counted(self: StoredStream) -> Tensor:
        nonlocal count
        count += 1
        return decoded(self)

    monkeypatch.setattr(StoredStream, "decoded", counted)
    ids = torch.tensor([random_ids(190, 96, 8)])
    found: list[Tensor] = []
    for anew in (False, True):
        cache, count = cache_for(model, name), 0
        with torch.inference_mode():
            logits = [model(ids[:, :150], cache=cache).logits[:, -1]]
            for at in range(150, 190):
                for layer in cache.layers if anew else ():
                    layer.seen = [None, None]
                logits.append(model(ids[:, at : at + 1], cache=cache).logits[:, -1])
        found.append(torch.stack(logits))
        # 4 layers of 2 streams; 142 tokens have left the window at first, 182 at last
        assert count == 8 * (41 if anew else 1 + 182 // 16 - 142 // 16)
    assert torch.equal(*found)


# --- families ------------------------------------------------------------------------------------

IDS = torch.randint(2, 96, (2, 25), generator=torch.Generator().manual_seed(1))
TOKENS = IDS.shape[1]


def read(kind: str, cache: Cache, name: str = "cache") -> Tensor:
    """Logits [2, 25, vocabulary] of a prompt, of more of it and of single tokens, all of which
    are past the window of 8. `name`: of the argument."""
    pieces = IDS.split([14, 7, 1, 1, 1, 1], dim=1)
    with torch.inference_mode():
        return torch.cat([cached_model(kind)(ids, **{name: cache}).logits for ids in pieces], 1)


def of_transformers(kind: str) -> Cache:
    return DynamicCache(config=cached_model(kind).config)


@pytest.mark.parametrize("kind", FIELDS)
def test_every_kind_of_layer_under_the_exact_arm_is_transformers_own_cache(kind: str) -> None:
    """Bit for bit; and RoPE undone and done again is nothing but rounding."""
    plain = read(kind, of_transformers(kind))
    assert torch.equal(read(kind, cache_for(cached_model(kind), "exact")), plain)
    coded = read(kind, cache_for(cached_model(kind), "lloyd:K3V2"))
    assert coded.isfinite().all()
    assert (coded - plain).abs().max() > 0.1
    turned = read(kind, cache_for(cached_model(kind), "identity:lloyd"))
    assert (turned - plain).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_argument(name: str) -> None:
    model, options = cached_model("mistral"), {"max_new_tokens": 12, "do_sample": False}
    cache = cache_for(model, "exact")
    found = model.generate(IDS, **{name: cache}, **options)
    assert torch.equal(found, model.generate(IDS, **options))
    assert cache.get_seq_length() == TOKENS + 12 - 1
    read("mistral", coded := cache_for(model, "lloyd:K3V2"), name)
    assert coded.get_seq_length() == TOKENS


@pytest.mark.parametrize("kind", [kind for kind in FIELDS if kind != "qwen3_next"])
def test_rope_is_undone_as_the_model_did_it(kind: str) -> None:
    """Layer 0 has the same keys for equal tokens, but for RoPE. (qwen3_next has none there.)"""
    model, cache = cached_model(kind), cache_for(cached_model(kind), "exact")
    model(torch.full((1, 7), 5), cache=cache)
    layer = cache.layers[0]
    (rotated, stream), = [
        (x, stream)
        for x, stream in zip(layer.store.decoded(0), layer.streams, strict=True)
        if stream.rope
    ]  # fmt: skip
    positions = torch.arange(7)[None]
    keys = stream.rotation.undo(rotated, positions)
    largest = keys.abs().max()
    assert (rotated - rotated[:, :, :1]).abs().max() > 0.1 * largest
    assert (keys - keys[:, :, :1]).abs().max() < 1e-5 * largest
    assert (stream.rotation.redo(keys, positions) - rotated).abs().max() < 1e-5 * largest


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("name", ["exact", "lloyd:K3V2", "trellis:K4V2@window=3@sink=2"])
def test_windows_hold_their_last_tokens_but_one(kind: str, name: str) -> None:
    cache = cache_for(cached_model(kind), name)
    read(kind, cache)
    tokens, vector = TOKENS, 2 * 2 * 2 * 16  # sequences x (keys, values) x heads x dim
    for layer, theirs in zip(cache.layers, of_transformers(kind).layers, strict=True):
        held = WINDOW - 1 if theirs.is_sliding else tokens
        assert layer.is_sliding == theirs.is_sliding
        assert layer.store.elements(0) == held * vector
        assert layer.get_seq_length() == tokens
        assert layer.get_mask_sizes(1) == (held + 1, tokens - held)
        stored = sum(stream.held_bytes for stream in layer.store.arms[0])
        assert stored <= held * vector * 4 + 8 * 34  # float32, and the means of 8 heads
        tensors = [stream.head for stream in layer.store.arms[0] if stream.head is not None]
        assert all(x.untyped_storage().nbytes() <= x.nbytes * (held + 1) / held for x in tensors)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma3_text", "lloyd:K3V2@sink=2"),
        ("qwen3_next", "lloyd:K4V2"),
        ("deepseek_v3", "e8:K3V2"),
    ],
)
def test_sizes_are_those_of_the_arithmetic_and_states_count_apart(kind: str, name: str) -> None:
    cache = cache_for(cached_model(kind), name)
    read(kind, cache)
    # 2 of 4 layers: convolutions of 4 x (2 x 2 + 4) x 16, recurrences of 4 x 16 x 16, in float32
    states = State("conv", 4 * 128, bits=32), State("recurrent", 4 * 16 * 16, bits=32)
    layers = [getattr(layer, "streams", states) for layer in cache.layers]
    measured, wanted = cache_size(cache), kv_size(parse(name), layers, TOKENS)
    assert measured.tokens == 2 * wanted.tokens
    assert measured.elements == 2 * wanted.elements
    assert measured.nbytes == pytest.approx(2 * wanted.nbytes, rel=1e-3)
    assert measured.state_bytes == 2 * wanted.state_bytes
    assert measured.state_bytes == (24576 if kind == "qwen3_next" else 0)


def test_models_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(InputError, match="found no rotary_emb"):
        cache_for(torch.nn.Linear(2, 2), "K3V2")
    llama = cached_model("llama")

    def disguised(kind: str, **fields: object) -> SimpleNamespace:
        config = AutoConfig.for_model(kind, num_hidden_layers=2, **fields)
        return SimpleNamespace(config=config, get_decoder=llama.get_decoder)

    with pytest.raises(InputError, match="LinearAttentionAndFullAttentionLayer in its cache"):
        cache_for(disguised("falcon_h1"), "K3V2")
    with pytest.raises(InputError, match="found no layer that keeps keys"):
        cache_for(disguised("lfm2", layer_types=["conv", "conv"]), "K3V2")
    expanded = cache_for(disguised("deepseek_v3"), "K3V2")
    with pytest.raises(InputError, match=r"found keys \[2, 16\] of a model with a latent of 512"):
        expanded.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(InputError, match="'k' has head size 16, needed a multiple of 64"):
        cache_for(llama, "int4").update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
