"""Experts that are fetched by id: the right bytes in any place, and what is worth keeping stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_builders import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import drive, requests, tokens

from layersweep.environment import Budget
from layersweep.errors import CheckpointError
from layersweep.generate.scheduler import Scheduler
from layersweep.stream.blocks import split_experts
from layersweep.stream.experts import ExpertStore
from layersweep.sweep.model import Model, load


@pytest.fixture(scope="module")
def model() -> Model:
    return load("demo", device="cpu")


@pytest.fixture(scope="module")
def dense(model: Model) -> list[torch.Tensor]:
    """The first weight of every expert, from a store that has room for all."""
    _, routed = split_experts(model.specs)
    store = opened(model, len(routed))
    return [first_weight(block) for blocks in visits(store, range(len(routed))) for block in blocks]


def opened(model: Model, slots: int, home_bytes: int = 0) -> ExpertStore:
    _, routed = split_experts(model.specs)
    device, decode = model.compute.device, model.compute.ops.decode
    return ExpertStore(routed, slots, device, decode=decode, home_bytes=home_bytes)


def visits(store: ExpertStore, keys: range | list[int], at_once: int = 1) -> Iterator[list]:  # type: ignore[type-arg]
    store.begin()
    yield from store.visit(list(keys), at_once)
    store.end()


def first_weight(block) -> torch.Tensor:  # type: ignore[no-untyped-def]
    key = next(iter(block.spec.weights))
    return block.dense(key, torch.float32)


@settings(max_examples=12, deadline=None)
@given(
    slots=st.integers(3, 9),
    at_once=st.integers(1, 3),
    walks=st.lists(st.lists(st.sets(st.integers(0, 7)), min_size=4, max_size=4), max_size=4),
    ahead=st.booleans(),
)
def test_any_visits_see_the_bytes_of_the_file(
    model: Model, dense: list[torch.Tensor], slots: int, at_once: int,
    walks: list[list[set[int]]], ahead: bool,
) -> None:  # fmt: skip
    visits_see_the_file(opened(model, slots), dense, at_once, walks, ahead)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@settings(max_examples=15, deadline=None)
@given(
    slots=st.integers(3, 9),
    at_once=st.integers(1, 3),
    walks=st.lists(st.lists(st.sets(st.integers(0, 7)), min_size=4, max_size=4), max_size=4),
    home=st.floats(0, 1.1),
)
def test_a_gpu_sees_them_from_its_home_and_from_files(
    dense: list[torch.Tensor], slots: int, at_once: int, walks: list[list[set[int]]], home: float
) -> None:
    model = load("demo", device="cuda", dtype="float32")
    _, routed = split_experts(model.specs)
    room = int(home * sum(spec.nbytes for spec in routed))
    visits_see_the_file(opened(model, slots, room), dense, at_once, walks, True)


def visits_see_the_file(
    store: ExpertStore, dense: list[torch.Tensor], at_once: int, walks: list[list[set[int]]],
    ahead: bool,
) -> None:  # fmt: skip
    for walk in walks:
        store.begin()
        for layer, used in enumerate(walk):
            keys = store.chosen(layer, used)
            assert [store.specs[key].expert for key in keys] == sorted(used)
            seen = []
            for number, blocks in enumerate(store.visit(keys, at_once)):
                if (
                    ahead and number == 0 and layer < 3
                ):  # those of the next layer are asked for early
                    store.want(store.chosen(layer + 1, walk[layer + 1]))
                seen += [(block.spec.name, first_weight(block)) for block in blocks]
            assert [name for name, _ in seen] == [store.specs[key].name for key in keys]
            for key, (_, weight) in zip(keys, seen, strict=True):
                assert weight.cpu().equal(dense[key])
        store.end()
    store.close()


def test_walks_that_use_all_experts_keep_a_fixed_share(model: Model) -> None:
    """Where the one that was used longest ago would go, none would stay."""
    _, routed = split_experts(model.specs)
    store, half = opened(model, len(routed) // 2), len(routed) // 2
    for _ in range(4):
        list(visits(store, range(len(routed))))
    before = store.bytes_read
    list(visits(store, range(len(routed))))
    missed = (store.bytes_read - before) / sum(spec.stored_bytes for spec in routed)
    assert missed == pytest.approx(0.5, abs=1.5 / half)
    assert store.traffic.hit_rate == pytest.approx(0.4, abs=0.05)  # of five walks, the first none


def test_experts_that_a_text_likes_stay(model: Model) -> None:
    store = opened(model, 6)
    for walk in range(8):  # 0 and 1 in every walk, one of the others in turn
        list(visits(store, [0, 1, 2 + walk % 6]))
    store.traffic.hits = store.traffic.misses = 0
    for walk in range(6):
        list(visits(store, [0, 1, 8 + walk]))
    assert (store.traffic.hits, store.traffic.misses) == (12, 6)


def test_a_damaged_expert_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    model = load(str(folder), device="cpu")
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as handle:
            handle.truncate(file.stat().st_size // 2)
    store = opened(model, 4)
    with pytest.raises(CheckpointError, match="ends after 0 bytes"):
        list(visits(store, range(4)))


def test_tokens_are_the_same_wherever_experts_are(model: Model) -> None:
    asked = requests(model.decoder.vocab_size, lengths=(1, 5, 40))
    with Scheduler(model, most=8, longest=128) as scheduler:
        assert scheduler.room.slots == 0
        resident = tokens(drive(scheduler, asked))
    weights = sum(spec.nbytes for spec in model.specs)
    for share, slots in ((0.95, 30), (0.6, 2)):
        small = replace(model, ram=Budget(int(weights * share), "test"))
        with Scheduler(small, most=8, longest=128) as scheduler:
            assert scheduler.room.slots == slots
            assert scheduler.room.host == f"resident, {slots} experts at a time, by id"
            assert tokens(drive(scheduler, asked)) == resident
