"""Bits by layer: how they are given, the file that they come from, and arms that read it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layersweep.errors import InputError
from layersweep.kv import parse, parse_arms
from layersweep.kv.calibration import (
    MEASURED_BITS,
    Calibration,
    Cost,
    LayerCosts,
    allocate,
    read_calibration,
    write_calibration,
)
from layersweep.kv.size import kv_size
from layersweep.kv.store import KvStore
from layersweep.kv.stream import keys_and_values

EASY, HARD = (Cost(128, tuple(nats * 4.0**-bits for bits in MEASURED_BITS)) for nats in (0.1, 9.0))


def calibration(*layers: LayerCosts) -> Calibration:
    return Calibration("tiny", "f" * 64, "0" * 64, 4, 1024, 128, ("trellis:K1V1",), layers)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, the second and the last with a window; the first's keys cost most."""
    path = tmp_path_factory.mktemp("calibration") / "Tiny.json"
    layers = (
        LayerCosts(HARD, EASY), LayerCosts(EASY, HARD, 64),
        LayerCosts(EASY, EASY), LayerCosts(EASY, EASY, 64),
    )  # fmt: skip
    write_calibration(path, calibration(*layers))
    return path


# --- bits ----------------------------------------------------------------------------------------

POSITIVE = st.floats(1e-6, 1.0)


def loss(costs: list[Cost], bits: tuple[int, ...]) -> float:
    return sum(cost.nats[at - 1] for cost, at in zip(costs, bits, strict=True))


def best(costs: list[Cost], budget: float) -> float:
    """The smallest loss of all bits that fit."""
    every = itertools.product(MEASURED_BITS, repeat=len(costs))
    size = [cost.elements for cost in costs]
    return min(
        loss(costs, bits)
        for bits in every
        if sum(b * n for b, n in zip(bits, size, strict=True)) <= budget
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(POSITIVE, min_size=4, max_size=4), min_size=1, max_size=4), st.data())
def test_bits_of_equal_streams_are_the_best_there_are(
    drops: list[list[float]], data: st.DataObject
) -> None:
    """Costs that fall ever more slowly: the greedy choice is the best one, of all that fit."""
    falling = (sorted(each) for each in drops)
    costs = [Cost(64, tuple(itertools.accumulate(each))[::-1]) for each in falling]
    budget = 64 * data.draw(st.integers(len(costs), 4 * len(costs)))
    bits = allocate(costs, budget)
    assert 64 * sum(bits) == budget
    assert loss(costs, tuple(bits)) == pytest.approx(best(costs, budget))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([64, 512]), st.lists(POSITIVE, min_size=4, max_size=4)),
        min_size=1, max_size=4,
    ),
    st.floats(1, 4),
)  # fmt: skip
def test_bits_of_any_streams_fit_and_leave_no_room_for_one_more(
    measured: list[tuple[int, list[float]]], mean: float
) -> None:
    """Measured costs need not fall; unlike sizes need not fill the budget."""
    costs = [Cost(size, tuple(nats)) for size, nats in measured]
    total = sum(cost.elements for cost in costs)
    bits = allocate(costs, mean * total)
    used = sum(cost.elements * at for cost, at in zip(costs, bits, strict=True))
    assert used <= mean * total
    rising = [cost.elements for cost, at in zip(costs, bits, strict=True) if at < 4]
    assert all(used + size > mean * total for size in rising)


def test_bits_go_where_they_save_most_and_keep_to_layers_that_hold_the_same_tokens(
    file: Path,
) -> None:
    found = read_calibration(file)
    # of the full layers' 4 streams, keys 0 cost most; of the windowed ones', values 1
    assert found.bits(2, 2) == [(4, 2), (2, 4), (1, 1), (1, 1)]
    assert found.bits(2.5, 2) == [(4, 2), (2, 4), (2, 1), (2, 1)]
    assert found.bits(4, 4) == [(4, 4)] * 4
    assert found.bits(16, 2) == [(16, 2), (16, 3), (16, 2), (16, 1)]
    for of in ((0, 2), (1, 3)):
        assert sum(sum(found.bits(3, 2)[layer]) for layer in of) == 2 * (3 + 2)


@pytest.mark.parametrize("keys", [0.5, 4.5, 8])
def test_means_that_no_bits_have_are_refused(keys: float, file: Path) -> None:
    with pytest.raises(InputError, match=f"found a mean of {keys:g} bits, needed 1 to 4, or 16"):
        parse(f"K{keys}V2@calibration={file}")


# --- the file ------------------------------------------------------------------------------------


def test_what_is_written_is_read(file: Path) -> None:
    found = read_calibration(file)
    layers = found.layers
    assert replace(found, name="", sha256="") == calibration(*layers)
    assert (layers[0].keys, layers[1].values, layers[1].window) == (HARD, HARD, 64)
    assert found.name == "Tiny"
    assert file.read_text().count("\n") == 17  # a layer is a line, for people


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("calibration/1", "calibration/0", "its schema is not layersweep.calibration/1"),
        ('"windows"', '"window"', "unexpected keyword argument 'window'"),
        ('"elements": 128, ', "", "missing 1 required positional argument: 'elements'"),
        ('"nats": [0.025, ', '"nats": [', "3 costs where 4 bits were measured"),
        ("0.025", "NaN", "nan nats"),
        ("{", "", "Extra data"),
    ],
)
def test_a_damaged_file_is_refused(
    old: str, new: str, message: str, file: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(InputError) as refused:
        parse(f"K3V2@calibration={damaged}")
    assert message in str(refused.value)
    assert "layersweep calibrate MODEL" in refused.value.hint


# --- arms ----------------------------------------------------------------------------------------


def test_an_arm_has_each_layers_own_bits(file: Path) -> None:
    arm = parse(f"K3V2@calibration={file}")
    assert arm.name == "trellis:K3V2@fit=1@found=1@calibration=Tiny"
    assert (arm.key_bits, arm.value_bits) == (3, 2)
    digest = read_calibration(file).sha256[:8]
    assert arm.codec_version == f"{parse('K3V2').codec_version}, calibration {digest}"
    keys, values = arm.layer_bits[1]  # type: ignore[index]
    assert arm.in_layer(1, 4) == replace(arm, key_bits=keys, value_bits=values, calibration=None)
    assert {(codec.key_bits, codec.value_bits) for codec in arm.codecs} == set(
        arm.layer_bits  # type: ignore[arg-type]
    )
    assert (
        parse(f"K2.5V2@calibration={file}").name == "trellis:K2.5V2@fit=1@found=1@calibration=Tiny"
    )


@pytest.mark.parametrize("tokens", [50, 300])
def test_a_calibrated_cache_is_as_large_as_an_even_one(file: Path, tokens: int) -> None:
    """In every layer and together, at every length of the text, by arithmetic and measured."""
    layers = [keys_and_values(2, 64, window) for window in (None, 64, None, 64)]
    arm, even = parse(f"K3V2@calibration={file}"), parse("K3V2")
    assert kv_size(arm, layers, tokens).nbytes == kv_size(even, layers, tokens).nbytes
    measured = [0.0, 0.0]
    for layer, streams in enumerate(layers):
        first = streams[0].first_held(tokens)
        x = torch.randn(1, 2, tokens - first, 64)
        of_arms = [(each, streams) for each in (arm, even)]
        store = KvStore.empty(of_arms, layer, 4, first=first).appended((x, x))
        measured = [size + store.nbits(index) for index, size in enumerate(measured)]
    assert measured[0] == measured[1]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("K2.5V2", "found 2.5 bits, needed a whole number without @calibration", "calibrate"),
        ("K3V2@calibration=no/such.json", "found No such file or directory", "calibrate"),
        ("K3V2@calibration=FILE@pb=1", "found @calibration with @pb or @layers", "all layers"),
        ("K3V2@calibration=FILE@layers=1", "found @calibration with @pb or @layers", ""),
        ("K2-3V2@calibration=FILE", "found a range of bits, needed one mean", ""),
        ("e8:K3V2@calibration=FILE", "unknown option of 'e8' 'calibration'", ""),
        ("int4@calibration=FILE", "unknown option of 'int4' 'calibration'", ""),
    ],
)
def test_refused_arms(text: str, message: str, hint: str, file: Path) -> None:
    with pytest.raises(InputError) as refused:
        parse(text.replace("FILE", str(file)))
    assert message in str(refused.value)
    assert hint in refused.value.hint


def test_another_model_and_another_file_of_the_name_are_refused(file: Path, tmp_path: Path) -> None:
    arm = parse(f"K3V2@calibration={file}")
    arm.check_model(4)
    arm.check_model(4, "f" * 64)
    with pytest.raises(InputError, match="found 4 layers of tiny, needed 5, as the model has"):
        arm.check_model(5)
    with pytest.raises(InputError, match="found fingerprint ffffffffffff of tiny, needed abc"):
        arm.check_model(4, "abc")
    other = tmp_path / "Tiny.json"
    other.write_text(file.read_text().replace("tiny", "other"))
    with pytest.raises(InputError, match="with the same name"):
        parse_arms(f"K3V2@calibration={file},K3V2@calibration={other}")
