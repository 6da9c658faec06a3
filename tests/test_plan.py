"""The planner: pure arithmetic, checked without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtral_shapes import MIXTRAL, mixtral_specs

from layersweep.checkpoint.synth_shapes import SHAPES
from layersweep.errors import BudgetError, InputError
from layersweep.families.weights import BlockShape
from layersweep.kv import parse
from layersweep.stream.blocks import BlockSpec
from layersweep.stream.plan import Plan, cut, make_plan
from layersweep.stream.rates import MACHINES
from layersweep.stream.runs import choose_spread, compute_ring, runs_of, staging_ring
from layersweep.stream.shapes import (
    Machine,
    TileShape,
    dense_bytes,
    experts_at_once,
    head_bytes,
    rows_at_once,
    scratch_bytes,
    temporary_bytes,
    tile_bytes,
    tile_flops,
)
from layersweep.study.forecast import forecast
from layersweep.tasks.registry import TASKS
from layersweep.tasks.settings import EvalSettings

SPECS = mixtral_specs()
RUNS = runs_of(SPECS)
READ_BYTES = 24_482_930_944
GIB = 2**30
T4 = Machine(vram=14 * GIB, ram=8 * GIB, element=2, cpu=False, repeats_kv=True)


def tile(rows: int = 51_200) -> TileShape:
    return TileShape(
        name="t", rows=rows, longest=1536, spans=((1000, rows, 1),), read_rows=20 * 3 * 511,
        read_each=3 * 511, branches=3, sequences_at_once=8, rows_at_once=rows * 8 // 20,
    )  # fmt: skip


def planned(tiles: list[TileShape], **budgets: int) -> Plan:
    return make_plan(MIXTRAL, SPECS, tiles, replace(T4, **budgets))


def test_mixtral_blocks_hold_the_published_bytes() -> None:
    # 24,483,151,552 bytes are published; 928 quant_maps and JSON texts are not read again
    assert sum(spec.stored_bytes for spec in SPECS) == READ_BYTES
    assert len(SPECS) == 2 + 32 * 9
    layer = [spec for spec in SPECS if spec.layer == 0]
    assert [spec.stored_bytes for spec in layer[1:]] == [90_878_976] * 8
    assert 0 <= sum(s.nbytes for s in layer) - sum(s.stored_bytes for s in layer) < 176 * 256


def test_logits_of_a_large_vocabulary_are_held_in_pieces() -> None:
    # 512 MiB: 170 positions of 262,144 logits in float32 under 3 branches; Mixtral's fit whole
    gemma = replace(MIXTRAL, vocab_size=262_144)
    row = 2 * 4096 * 2
    assert head_bytes(gemma, tile(), 2) == 3 * 170 * (4 * 262_144 + row) + 1024
    assert head_bytes(MIXTRAL, tile(), 2) == 3 * 511 * (4 * 32_000 + row) + 1024
    assert temporary_bytes(gemma, [tile()], T4) == temporary_bytes(MIXTRAL, [tile()], T4)
    on_cpu = replace(T4, cpu=True)
    assert temporary_bytes(gemma, [tile()], on_cpu) == 4 * 170 * 4 * 262_144


STAY = "over the weights, which stay on the device"


@pytest.mark.parametrize(
    ("name", "context", "words"),
    [
        ("t4", 2048, "32 walks over the weights, part of which is streamed"),
        ("t4x2", 2048, f"layers over 2 devices, 34 walks {STAY}"),
        ("h200", 4096, f"16 walks {STAY}"),
    ],
)
def test_generated_answers_are_planned_as_eval_does_them(
    name: str, context: int, words: str
) -> None:
    settings = EvalSettings(tasks=("niah",), niah_mode="generate", niah_contexts=(context,))
    arms = [parse("K3V2"), parse("K4V2")]
    found = forecast(MIXTRAL, SPECS, settings, arms, MACHINES[name])
    assert (found.generation, found.sweeps) == (words, 0)
    assert found.plan.device_bytes <= found.plan.vram == MACHINES[name].vram
    # at least 3.5 ms of the host for each of 12 tiles, 32 layers and 15 tokens
    assert found.task_s["needle"] > 12 * 32 * 15 * 0.0035 and found.task_s["perplexity"] == 0
    assert found.total_s == found.task_s["needle"] + found.first_read_s
    both = forecast(MIXTRAL, SPECS, replace(settings, tasks=("ppl", "niah")), arms, MACHINES[name])
    assert both.sweeps == 1 and both.total_s > found.task_s["needle"]
    # beside perplexity each device generates with weights of its own
    assert "layers over" not in both.generation


def test_study_of_three_arms_is_one_sweep_in_14_gib_and_512_segments_are_two() -> None:
    arms = [parse("K3V2"), parse("K4V2")]
    # 14 GiB by torch's own cap, which leaves the context out
    machine = replace(MACHINES["t4"], vram=14 * 2**30)
    for segments, sweeps in ((80, 1), (512, 2)):
        settings = EvalSettings(tasks=("ppl",), segments=segments)
        found = forecast(MIXTRAL, SPECS, settings, arms, machine)
        assert len(found.plan.sweeps) == sweeps
        assert 4 * 2**30 < found.plan.device_bytes <= machine.vram


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("cpu", [True, False])
def test_a_plan_without_tiles_holds_weights_alone(kernels: bool, lanes: int, cpu: bool) -> None:
    """`--gate off` makes one before the tiles are known."""
    plan = make_plan(MIXTRAL, SPECS, [], replace(T4, kernels=kernels, lanes=lanes, cpu=cpu))
    assert plan.sweeps == ((),)
    assert {plan.peaks[name] for name in ("hidden states", "scratch", "temporaries")} == {0}
    assert plan.peaks.get("kept caches at work", 0) == 0


def test_flops_of_a_token_are_25_gflop_and_attention() -> None:
    plain = TileShape("t", 1, 1, (), 0, 0, 0, 0, 0)
    assert tile_flops(MIXTRAL, plain) == pytest.approx(25.5e9, rel=0.02)
    read = replace(plain, spans=((999, 1, 1),))  # one token that looks at 1000 keys
    assert tile_flops(MIXTRAL, read) - tile_flops(MIXTRAL, plain) == 32 * 4 * 4096 * 1000


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=30), st.integers(0, 40))
def test_every_tile_rides_exactly_once_and_in_order(rows: list[int], room: int) -> None:
    tiles = [tile(count) for count in rows]
    try:
        plan = planned(tiles, vram=room * GIB)
    except BudgetError as refusal:
        needed = dense_bytes(MIXTRAL, 2) + scratch_bytes(MIXTRAL, tiles, T4)
        needed += temporary_bytes(MIXTRAL, tiles, T4) + compute_ring(RUNS)
        needed += max(tile_bytes(MIXTRAL, t, 2) for t in tiles)
        assert needed > (room - 1) * GIB
        assert "needed" in str(refusal)
        return
    assert [index for sweep in plan.sweeps for index in sweep] == list(range(len(rows)))
    assert plan.device_bytes <= room * GIB
    assert plan.host_bytes <= T4.ram
    several = len(plan.sweeps) > 1
    assert (plan.host_kept_bytes + plan.device_kept_bytes > 0) == several


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.integers(1, 10**10))
def test_sweeps_are_as_few_as_can_be_and_even(sizes: list[int], room: int) -> None:
    room = max(room, max(sizes))
    sweeps = cut(sizes, room)
    assert [index for sweep in sweeps for index in sweep] == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in sweep) for sweep in sweeps]
    assert max(loads) <= room
    # first-fit of consecutive items is the fewest there can be
    fewest, used = 1, 0
    for size in sizes:
        fewest, used = (fewest + 1, size) if used + size > room else (fewest, used + size)
    assert len(sweeps) == fewest
    assert max(loads) <= sum(sizes) / fewest + max(sizes)


def test_twenty_six_tiles_in_room_for_twenty_are_two_sweeps_of_thirteen() -> None:
    assert [len(sweep) for sweep in cut([10] * 26, 205)] == [13, 13]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50), st.integers(0, 10**10))
def test_kept_runs_fit_their_budget_and_are_spread(sizes: list[int], budget: int) -> None:
    chosen = choose_spread(sizes, budget)
    assert sum(sizes[index] for index in chosen) <= budget
    assert (len(chosen) == len(sizes)) == (budget >= sum(sizes))


def test_half_of_equal_runs_is_every_other_one() -> None:
    assert sorted(choose_spread([10] * 8, 40)) == [1, 3, 5, 7]


def test_runs_of_mixtral_are_attention_with_an_expert_then_experts() -> None:
    assert len(RUNS) == 2 + 32 * 8
    layer = [run for run in RUNS if run.layer == 3]
    assert [len(run.offsets) for run in layer] == [2, *[1] * 7]
    assert min(run.nbytes for run in RUNS) >= 64 * 2**20
    assert [block for run in RUNS for block in run.blocks] == list(range(len(SPECS)))
    # one layer of 0.75 GB, two runs ahead, one that may be lost at the ring's end
    assert compute_ring(RUNS) == pytest.approx(748.9e6 + 3 * 112.6e6, rel=0.01)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), min_size=1, max_size=40))
def test_runs_cover_every_block_once_and_stay_in_their_layer(blocks: list[tuple[int, int]]) -> None:
    blocks.sort(key=lambda block: block[0])
    specs = [BlockSpec(BlockShape("mlp", layer, {}), {}, size, size) for layer, size in blocks]
    runs = runs_of(specs, least=100)
    assert [block for run in runs for block in run.blocks] == list(range(len(specs)))
    for run in runs:
        assert {specs[block].layer for block in run.blocks} == {run.layer}
        sizes = [specs[block].nbytes for block in run.blocks]
        assert run.nbytes == sum(sizes)
        assert sum(sizes[:-1]) < 100  # it ended as soon as it was large enough
        assert list(run.offsets) == [sum(sizes[:i]) for i in range(len(sizes))]


def test_one_sweep_reads_every_byte_once_and_keeps_nothing() -> None:
    plan = planned([tile()], ram=4 * GIB)
    assert plan.bytes_to_read == READ_BYTES
    assert plan.host_kept_bytes == plan.device_kept_bytes == 0
    assert plan.host == "ring"
    assert plan.placement.host_ring == GIB
    assert plan.placement.drop_cache  # 4 GiB do not hold the files


def test_a_second_sweep_reads_only_what_is_not_kept() -> None:
    tiles = [tile() for _ in range(20)]
    plan = planned(tiles, ram=16 * GIB)
    assert len(plan.sweeps) == 2
    kept = plan.placement.device | plan.placement.host
    again = sum(run.stored_bytes for run in RUNS if run.index not in kept)
    assert plan.bytes_to_read == READ_BYTES + again
    assert 14 * GIB < plan.host_kept_bytes <= 15 * GIB
    on_device = sum(RUNS[index].nbytes for index in plan.placement.device)
    whole = sum(run.nbytes for run in RUNS)
    assert plan.bytes_to_copy == 2 * whole - on_device
    assert plan.device_bytes <= T4.vram


@pytest.mark.parametrize("ram, dropped", [(30 * GIB, True), (48 * GIB, False)])
def test_files_stay_in_the_page_cache_where_they_fit_beside_what_is_kept(
    ram: int, dropped: bool
) -> None:
    """22.8 GiB of files, and as much of it in memory of our own as does not fit the device."""
    plan = planned([tile() for _ in range(20)], ram=ram)
    assert 19 * GIB < plan.host_kept_bytes < 20 * GIB
    assert plan.placement.drop_cache == dropped


def test_a_large_card_keeps_everything_for_the_second_sweep() -> None:
    plan = planned([tile() for _ in range(80)], vram=64 * GIB)
    assert len(plan.sweeps) == 2
    assert (plan.host, plan.placement.host) == ("resident", frozenset())
    assert plan.bytes_to_read == READ_BYTES


@pytest.mark.parametrize(
    ("budget", "flag"), [({"vram": GIB}, "--vram"), ({"ram": GIB // 4}, "--ram")]
)
def test_what_cannot_fit_is_refused_with_what_would(budget: dict[str, int], flag: str) -> None:
    with pytest.raises(BudgetError, match=flag) as refusal:
        planned([tile()], **budget)
    assert flag in refusal.value.hint


def test_the_least_host_memory_is_two_of_the_largest_runs() -> None:
    least = staging_ring(RUNS)
    assert planned([tile()], ram=least).placement.host_ring == least
    with pytest.raises(BudgetError):
        planned([tile()], ram=least - 1)


def test_an_expert_of_a_tile_is_one_product_unless_routing_is_very_uneven() -> None:
    # 51,200 rows x 2 / 8 = 12,800 on average
    assert rows_at_once(MIXTRAL.layers[0].feed, "expert", 51_200, cpu=False) == 16_000


@pytest.mark.parametrize(
    ("model", "wanted"),
    [("qwen3-30b-a3b", 32), ("gpt-oss-20b", 8), ("deepseek-v2-lite", 16), ("mixtral-8x7b", 1)],
)
def test_small_experts_are_visited_in_groups_of_one_size(model: str, wanted: int) -> None:
    """128 x 9 MiB, 32 x 47 MiB, 64 x 17 MiB and 8 x 336 MiB, of which a row visits 8, 4, 6, 2."""
    decoder = SHAPES[model].decoder
    assert experts_at_once(decoder, decoder.layers[-1], 2, cpu=False) == wanted
    assert experts_at_once(decoder, decoder.layers[-1], 2, cpu=True) == 1


def test_rows_that_experts_see_are_kept_where_that_costs_no_walk() -> None:
    qwen, tiles = SHAPES["qwen3-30b-a3b"].decoder, [tile() for _ in range(4)]
    card = replace(T4, repeats_kv=False, grouped=True)
    plain = make_plan(qwen, SPECS, tiles, replace(card, grouped=False))
    keeping = make_plan(qwen, SPECS, tiles, card)
    assert (plain.keeps_normed, keeping.keeps_normed) == (False, True)
    assert keeping.device_bytes - plain.device_bytes == 4 * 51_200 * 2048 * 2
    assert make_plan(qwen, SPECS, tiles, replace(card, vram=keeping.device_bytes)) == replace(
        keeping, vram=keeping.device_bytes
    )
    less = keeping.device_bytes - 1
    assert make_plan(qwen, SPECS, tiles, replace(card, vram=less)) == replace(plain, vram=less)
    assert not make_plan(MIXTRAL, SPECS, tiles, card).keeps_normed  # one expert at a time


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="32768"):
        settings = EvalSettings(niah_contexts=(65_536,))
        forecast(MIXTRAL, SPECS, settings, [parse("K3V2")], MACHINES["h200"])


def test_placeholder_tiles_have_the_rows_of_the_study() -> None:
    arms = [parse("K3V2"), parse("K4V2")]
    tiles = [t for kind in TASKS for t in kind.task.placeholders(EvalSettings(), arms)]
    # 80 windows of 1024 + 3 x 512, controls (identity, exact) on 4 of them; 60 needles
    windows = sum(t.rows for t in tiles if t.name == "perplexity")
    assert windows == 80 * (1024 + 3 * 512) + 4 * 2 * 512
    assert sum(len(t.sequences) for t in tiles if t.name == "needle") == 60
