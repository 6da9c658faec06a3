"""The planner: pure arithmetic, checked without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtral_shapes import MIXTRAL, mixtral_specs

from layersweep.errors import BudgetError, InputError
from layersweep.evals.forecast import forecast, placeholder_tiles
from layersweep.evals.settings import EvalSettings
from layersweep.kv import parse
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.plan import TileShape, make_plan, scratch_bytes, tile_bytes, tile_flops
from layersweep.stream.rates import MACHINES
from layersweep.stream.store import choose_resident, minimum_ring

SPECS = mixtral_specs()
READ_BYTES = 24_482_930_944


def tile(rows: int = 51_200) -> TileShape:
    return TileShape(
        "t", rows, 1536, rows * 1000, 20 * 3 * 511, 3 * 511, rows // 2, 10 * 1536 * 4096
    )


def test_mixtral_blocks_hold_the_published_bytes() -> None:
    # 24,483,151,552 bytes are published; 928 quant_maps and JSON texts are not read again
    assert sum(spec.stored_bytes for spec in SPECS) == READ_BYTES
    assert len(SPECS) == 2 + 32 * 9
    layer = [spec for spec in SPECS if spec.layer == 0]
    assert [spec.stored_bytes for spec in layer[1:]] == [90_878_976] * 8
    assert 0 <= sum(s.nbytes for s in layer) - sum(s.stored_bytes for s in layer) < 176 * 256


def test_study_of_three_arms_is_one_sweep_in_14_gib_and_512_segments_are_two() -> None:
    arms = [parse("K3V2"), parse("K4V2")]
    # 14 GiB by torch's own cap, which leaves the context out
    machine = replace(MACHINES["t4"], vram=14 * 2**30)
    for segments, sweeps in ((80, 1), (512, 2)):
        settings = EvalSettings(tasks=("ppl",), segments=segments)
        found = forecast(MIXTRAL, SPECS, settings, arms, machine)
        assert len(found.plan.sweeps) == sweeps
        assert 4 * 2**30 < found.plan.device_bytes <= machine.vram


def test_flops_of_a_token_are_25_gflop_and_attention() -> None:
    plain = TileShape("t", 1, 1, 0, 0, 0, 0, 0)
    assert tile_flops(MIXTRAL, plain) == pytest.approx(25.5e9, rel=0.02)
    assert tile_flops(MIXTRAL, tile(1)) - tile_flops(MIXTRAL, plain) > 32 * 4 * 4096 * 1000


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=30), st.integers(0, 40))
def test_every_tile_rides_exactly_once_and_in_order(rows: list[int], room: int) -> None:
    tiles = [tile(count) for count in rows]
    ram = 8 * 2**30
    try:
        plan = make_plan(MIXTRAL, SPECS, tiles, element=2, vram=room * 2**30, ram=ram, cpu=False)
    except BudgetError as refusal:
        scratch = sum(scratch_bytes(MIXTRAL, tiles, 2, cpu=False).values())
        biggest = max(tile_bytes(MIXTRAL, t, 2) for t in tiles)
        assert scratch + biggest + minimum_ring(SPECS) > (room - 1) * 2**30
        assert "needed" in str(refusal)
        return
    assert [index for sweep in plan.sweeps for index in sweep] == list(range(len(rows)))
    assert plan.device_bytes <= room * 2**30
    assert plan.resident_bytes + plan.ring_bytes <= ram
    assert (plan.resident_bytes == 0) == (len(plan.sweeps) == 1)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50), st.integers(0, 10**10))
def test_resident_blocks_fit_their_budget(sizes: list[int], budget: int) -> None:
    specs = [BlockSpec(str(i), 0, {}, size, size) for i, size in enumerate(sizes)]
    chosen = choose_resident(specs, budget)
    assert sum(sizes[index] for index in chosen) <= budget
    assert len(chosen) == len(sizes) or budget < sum(sizes)


def test_one_sweep_reads_every_byte_once_and_keeps_nothing() -> None:
    plan = make_plan(MIXTRAL, SPECS, [tile()], element=2, vram=14 * 2**30, ram=4 * 2**30, cpu=False)
    assert plan.bytes_to_read == READ_BYTES
    assert plan.resident_bytes == 0
    assert plan.host == "disk"


def test_a_second_sweep_reads_only_what_is_not_resident() -> None:
    tiles = [tile() for _ in range(20)]
    plan = make_plan(MIXTRAL, SPECS, tiles, element=2, vram=14 * 2**30, ram=16 * 2**30, cpu=False)
    assert len(plan.sweeps) == 2
    kept = choose_resident(SPECS, plan.resident_bytes)
    again = sum(spec.stored_bytes for i, spec in enumerate(SPECS) if i not in kept)
    assert plan.bytes_to_read == READ_BYTES + again
    assert 14 * 2**30 < plan.resident_bytes < 16 * 2**30


@pytest.mark.parametrize(
    ("budget", "flag"), [({"vram": 2**30}, "--vram"), ({"ram": 2**29}, "--ram")]
)
def test_what_cannot_fit_is_refused_with_what_would(budget: dict[str, int], flag: str) -> None:
    sizes = {"vram": 14 * 2**30, "ram": 4 * 2**30} | budget
    with pytest.raises(BudgetError, match=flag) as refusal:
        make_plan(MIXTRAL, SPECS, [tile()], element=2, cpu=False, **sizes)
    assert flag in refusal.value.hint


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="32768"):
        settings = EvalSettings(niah_contexts=(65_536,))
        forecast(MIXTRAL, SPECS, settings, [parse("K3V2")], MACHINES["h200"])


def test_placeholder_tiles_have_the_rows_of_the_study() -> None:
    arms = [parse("K3V2"), parse("K4V2")]
    tiles = placeholder_tiles(EvalSettings(), arms, 80)
    # 80 windows of 1024 + 3 x 512, controls (identity, exact) on 4 of them; 60 needles
    windows = sum(t.rows for t in tiles if t.name == "perplexity")
    assert windows == 80 * (1024 + 3 * 512) + 4 * 2 * 512
    assert sum(len(t.sequences) for t in tiles if t.name == "needle") == 60
