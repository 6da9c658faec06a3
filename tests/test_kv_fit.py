"""Coordinates and predictions from a text: what they promise, and who uses them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_study
import torch
from checkpoint_builders import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import random_ids, sweep_logits, windows
from torch import Tensor

from layersweep.families.spec import Latent
from layersweep.kv import parse
from layersweep.kv.arms import EXACT
from layersweep.kv.codec import Packed
from layersweep.kv.fit import Fit, even, fit
from layersweep.kv.store import KvStore
from layersweep.kv.stream import Stream, keys_and_values
from layersweep.kv.trellis import Trellis
from layersweep.stream.shapes import fit_bytes, tile_bytes
from layersweep.study.study import prepare_study
from layersweep.sweep import attention, reference
from layersweep.sweep.context import LayerContext, Table
from layersweep.sweep.heads import Projected
from layersweep.sweep.model import Model, load
from layersweep.sweep.reference import FIRST, _by_distance, _edges, _ranges, _sums
from layersweep.sweep.reference import fitted as fitted_to
from layersweep.sweep.sequences import reference_tile, tiles_of
from layersweep.tasks.settings import EvalSettings
from layersweep.text.reference import MOST, reference_ids
from layersweep.text.tokenizer import TextTokenizer

GROUPS, DIM, HIDDEN, TOKENS = 2, 64, 150, 900


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [G, N, D] of hidden states that use few directions, and their weights."""
    uneven = torch.logspace(0, -1.5, HIDDEN, dtype=torch.float64)
    white = draw(2 * GROUPS * DIM, HIDDEN, seed=1)
    both = (draw(tokens, HIDDEN, seed=seed) * uneven) @ white.T
    k, v = both.view(tokens, 2, GROUPS, DIM).permute(1, 2, 0, 3).float()
    return k, v, white.float()


def fitted() -> Fit:
    k, v, white = layer(TOKENS)
    seen = torch.diag_embed(torch.logspace(1, -1, DIM).expand(GROUPS, -1))
    return fit(k, v, torch.ones(GROUPS, TOKENS), seen, white)


def test_an_even_error_costs_least_in_its_coordinates() -> None:
    """x' = x A with M = A A^T, M C M = Q, and tr(M C) tr(M^-1 Q) is (tr (C Q)^(1/2))^2."""
    root = draw(DIM, DIM) * torch.logspace(0, -1, DIM, dtype=torch.float64)
    c, q = (root.T @ root)[None], torch.diag(torch.logspace(-1, 1, DIM).double())[None]
    basis = even(c, q)
    into, back = basis.into[0].double(), basis.back[0].double()
    assert (into @ back - torch.eye(DIM)).abs().max() < 1e-4
    cost = torch.trace(into.T @ c[0] @ into) * torch.trace(back @ q[0] @ back.T)
    least = torch.linalg.eigvals(c[0] @ q[0]).real.clamp(min=0).sqrt().sum() ** 2
    assert least < cost < 1.05 * least
    assert torch.trace(c[0]) * torch.trace(q[0]) > 3 * least


def test_values_of_other_tokens_are_predicted_from_their_keys() -> None:
    k, v, _ = layer(500, seed=9)
    left = v - fitted().values.values(k[None])[0]
    assert left.square().mean() < 0.2 * v.square().mean()


def test_few_tokens_predict_no_worse_than_nothing() -> None:
    """Fewer tokens than directions: white hidden states keep the prediction in bounds."""
    k, v, white = layer(40)
    found = fit(k, v, torch.ones(GROUPS, 40), torch.eye(DIM).expand(GROUPS, -1, -1), white)
    other_k, other_v, _ = layer(500, seed=9)
    left = other_v - found.values.values(other_k[None])[0]
    assert left.square().mean() < 0.7 * other_v.square().mean()


@settings(max_examples=8)
@given(tokens=st.integers(6, 40), seed=st.integers(0, 99))
def test_sums_by_distance_equal_a_loop(tokens: int, seed: int) -> None:
    moved = draw(3, tokens, tokens, seed=seed).tril()[..., FIRST:]
    edges = _edges(tokens)
    found = _by_distance(moved, edges)
    for query in range(tokens):
        for index in range(len(edges) - 1):
            keys = [query - d - FIRST for d in range(edges[index], edges[index + 1])]
            wanted = sum(moved[:, query, key] for key in keys if key >= 0)
            assert (found[:, query, index] - wanted).abs().max() < 1e-9


def test_a_product_makes_all_sums_by_distance() -> None:
    edges, moved = _edges(40), draw(3, 40, 40)
    found = moved @ _ranges(*edges, device=moved.device).double()
    assert (found - _sums(moved, edges)).abs().max() < 1e-9


def test_distances_are_near_one_by_one_and_far_in_ratios() -> None:
    edges = _edges(1024)
    assert edges[:5] == [0, 1, 2, 3, 4] and edges[-1] == 1024 and len(edges) <= 25
    assert max(b / a for a, b in pairwise(edges[4:])) < 1.5


# --- stored streams ------------------------------------------------------------------------------


def told() -> tuple[Stream, Stream]:
    found, (keys, values) = fitted(), keys_and_values(GROUPS, DIM)
    return replace(keys, basis=found.keys), replace(values, prediction=found.values)


def store_of(arms: list[str], streams: tuple[Stream, Stream], mean: int | None = None) -> KvStore:
    return KvStore.empty([(parse(arm), streams) for arm in arms], 0, 1, mean)


def pair(tokens: int = 60) -> tuple[Tensor, Tensor]:
    k, v, _ = layer(tokens, seed=5)
    return k[None], v[None]


def error(arm: str, streams: tuple[Stream, Stream]) -> tuple[float, float]:
    """Of keys, in the coordinates of the fit, and of values."""
    k, v = pair(600)
    keys, values = store_of([arm], streams).appended((k, v)).decoded(0)
    enter = fitted().keys.enter
    return (enter(keys) - enter(k)).square().mean().item(), (values - v).square().mean().item()


def test_at_the_same_bits_keys_and_values_lose_less() -> None:
    plain, ours = keys_and_values(GROUPS, DIM), told()
    (key, value), (key_fit, value_fit) = error("trellis:K3V2", plain), error("trellis:K3V2", ours)
    assert key_fit < 0.8 * key
    assert value_fit < 0.4 * value
    sizes = [store_of(["trellis:K3V2"], one).appended(pair()).nbits(0) for one in (plain, ours)]
    assert sizes[0] == sizes[1]


GROWING = "trellis:K3V2@found=1@window=8@block=8@fine=16"


@pytest.mark.parametrize(
    "arm", ["trellis:K3V2@sink=4", "trellis:K16V2", "trellis:K2V16", "identity:trellis", GROWING]
)
def test_a_cache_that_grows_equals_one_made_at_once(arm: str) -> None:
    streams, (k, v) = told(), pair()
    whole = store_of([arm], streams, mean=20).appended((k, v))
    grown = store_of([arm], streams, mean=20)
    for start, stop in ((0, 40), (40, 41), (41, 60)):
        grown = grown.appended((k[:, :, start:stop], v[:, :, start:stop]))
    for one, another, x in zip(whole.decoded(0), grown.decoded(0), (k, v), strict=True):
        assert (one - another).abs().max() < 1e-4 * x.abs().max()
    moved, tail = whole.moved(Tensor.clone).since(30).decoded(0), whole.decoded(0)
    for one, another in zip(moved, tail, strict=True):
        assert (one - another[:, :, 30:]).abs().max() < 1e-4 * another.abs().max()


def test_arms_do_not_share_values_that_other_keys_predict() -> None:
    ours, plain, x = told(), keys_and_values(GROUPS, DIM), pair()
    arms = [("trellis:K3V2", ours), ("trellis:K2V2", ours), ("trellis:K3V2@states=1024", plain),
            ("trellis:K16V2", ours)]  # fmt: skip
    together = KvStore.empty([(parse(arm), own) for arm, own in arms], 0, 1).appended(x)
    for index, (arm, own) in enumerate(arms):
        alone = store_of([arm], own).appended(x).decoded(0)
        assert all(map(torch.equal, together.decoded(index), alone))


def test_keys_that_predict_values_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, decoded = Trellis.decode, []

    def decode(codec: Trellis, packed: Packed, positions: Tensor) -> Tensor:
        decoded.append((packed.role, packed.bits))
        return real(codec, packed, positions)

    monkeypatch.setattr(Trellis, "decode", decode)
    store = store_of(["K3V2", "K4V2"], told()).appended(pair())
    for arm in range(2):
        store.pieces(arm)
    assert decoded == [("key", 3), ("key", 4), ("value", 2), ("value", 2)]


# --- sweeps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_a_sweep_fits_on_the_reference_text_alone(tiny: Path) -> None:
    """Its numbers do not depend on what else rides, and without it weights serve."""
    model = load(str(tiny), device="cpu")
    arms = [EXACT, parse("trellis:K2V2@fit=1"), parse("trellis:K2V2")]
    tiles = tiles_of("t", windows(model, 4, arms), 2)
    text = random_ids(200, 128, 77)
    both, _ = sweep_logits(model, tiles, reference=text)
    apart, _ = sweep_logits(model, tiles, reference=text, sweeps=2)
    without, _ = sweep_logits(model, tiles)
    for index in range(4):
        exact, fits, weights = both[index]
        assert all(torch.equal(*pair) for pair in zip(both[index], apart[index], strict=True))
        assert torch.equal(exact, without[index][0])
        assert torch.equal(weights, without[index][2]) and torch.equal(weights, without[index][1])
        assert not torch.equal(fits, weights)


def test_heads_and_distances_that_share_launches_change_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = []

    def both(projected: Projected, table: Table | None, context: LayerContext) -> Fit:
        monkeypatch.setattr(reference, "_at_once", lambda q, k: (2, 5))
        together = fitted_to(projected, table, context)
        monkeypatch.setattr(reference, "_at_once", lambda q, k: (1, 1))
        alone = fitted_to(projected, table, context)
        for one, other in (
            (together.keys.into, alone.keys.into),
            (together.values.weight, alone.values.weight),
        ):
            apart.append(((one - other).abs().max() / other.abs().max()).item())
        return alone

    monkeypatch.setattr(attention, "fitted", both)
    model = load(str(tiny), device="cpu")
    tiles = tiles_of("t", windows(model, 1, [EXACT, parse("trellis:K2V2@fit=1")]), 1)
    sweep_logits(model, tiles, reference=random_ids(100, 128, 77))
    assert len(apart) == 2 * model.decoder.num_hidden_layers and max(apart) < 1e-4


def test_its_memory_is_planned(tiny: Path) -> None:
    model = load(str(tiny), device="cpu")
    tiles = tiles_of("t", windows(model, 2, [EXACT]), 2)
    plan, alone = replace(model, reference=(1,) * 200).plan(tiles), model.plan(tiles)
    shape = model.shape(reference_tile((1,) * 200))
    held = tile_bytes(model.decoder, shape, 4)
    assert plan.peaks["reference text"] == held == alone.peaks["hidden states"] // 128 * 200
    assert plan.peaks["temporaries"] >= fit_bytes(model.decoder, shape, cpu=True) > 4 * 4 * 200**2


def test_a_study_gives_the_text_to_arms_that_ask_and_says_where_it_cannot() -> None:
    model = load(str(tiny_study.model_folder()), device="cpu")
    asked = EvalSettings(
        kv="K3V2,e8:K3V2", segments=2, prefix=64, continuation=32, tasks=("ppl",), gate="off",
        text=str(tiny_study.text_file()),
    )  # fmt: skip
    study = prepare_study(model, asked)
    assert len(study.model.reference) == min(MOST, model.decoder.max_position_embeddings)
    assert not [one for one in study.fallbacks if "coordinates" in one.what]
    assert prepare_study(model, replace(asked, kv="e8:K3V2")).model.reference == ()
    study.model = model_of_latents(model)
    (said,) = [one for one in study.fallbacks if "coordinates" in one.what]
    assert said.what == "coordinates of trellis:K3V2@fit=1@found=1"
    assert said.used == "those in which keys come"


def model_of_latents(model: Model) -> Model:
    """The description alone."""
    decoder, latent = model.decoder, Latent(8, 4, 4)
    layers = [
        replace(one, attention=replace(one.attention, latent=latent)) for one in decoder.layers
    ]
    decoder = replace(decoder, layers=tuple(layers))
    return replace(model, checkpoint=replace(model.checkpoint, decoder=decoder))


def test_the_reference_text_fills_a_window_of_the_bundled_model() -> None:
    folder = Path(__file__).parents[1] / "src/layersweep/demo/model"
    ids = reference_ids(TextTokenizer.load(folder), None, 4096)
    assert len(ids) == MOST == 1024
    assert reference_ids(TextTokenizer.load(folder), 7, 100) == (7, *ids[:99])
