"""Answers that are generated: where weights, caches and tiles go, and that it changes no number."""

from __future__ import annotations

import json
import runpy
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_study
import torch
from checkpoint_builders import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtral_shapes import MIXTRAL, mixtral_specs
from stepped import in_one_pass, stepped, texts

from layersweep.cli.app import run
from layersweep.errors import BudgetError, MachineError, NoRoomTogether
from layersweep.families.spec import Decoder
from layersweep.generate.generation import Generation
from layersweep.generate.lanes import generate_units
from layersweep.generate.plan import plan_generation
from layersweep.kv.arms import EXACT, Arm, parse_arms
from layersweep.model.attention import PlainAttention
from layersweep.stream.blocks import BlockSpec, blocks_of
from layersweep.stream.host import HostStage
from layersweep.stream.runs import Placement, compute_ring, runs_of, spread_layers
from layersweep.stream.shapes import Machine, TileShape, tile_bytes
from layersweep.stream.store import BlockStore
from layersweep.study.run import TimeLimit
from layersweep.study.shrink import shrink
from layersweep.study.study import prepare_study
from layersweep.sweep.caches import KeptCaches, cache_memory
from layersweep.sweep.engine import Engine
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model, load
from layersweep.sweep.record import SweepRecord
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile, tiles_of
from layersweep.sweep.shapes import tile_shape
from layersweep.sweep.turn import HostTurn
from layersweep.tasks.settings import EvalSettings

GIB = 2**30
SPECS = mixtral_specs()
ARMS = parse_arms("K3V2,K4V2")

numbers = runpy.run_path(str(Path(__file__).parents[1] / "tools/kill_and_resume.py"))["numbers"]


@dataclass(frozen=True)
class Card:
    """A full-size Mixtral on a card that is not there: what planning asks of a Model."""

    vram: int
    ram: int
    decoder: Decoder = MIXTRAL
    specs: list[BlockSpec] = field(default_factory=lambda: SPECS)
    reference_shape: TileShape | None = None

    @property
    def machine(self) -> Machine:
        return Machine(self.vram, self.ram, element=2, cpu=False, context=650 * 2**20)


def cards(count: int, vram: int = 14, ram: int = 27) -> list[Card]:
    return [Card(vram * GIB, ram * GIB)] * count


def trials(context: int, count: int = 60) -> list[Tile]:
    every = [EXACT, *ARMS]
    one = BranchedSequence(
        (0,) * (context - 60), tuple(Branch(arm, (0,) * 60, (58, 59)) for arm in every)
    )
    return tiles_of("needle", [one] * count, 5)


@pytest.mark.parametrize(
    ("context", "first", "walks"), [(2048, [[3, 3]] * 2, 34), (4096, [[1, 1, 1]] * 4, 72)]
)
def test_two_t4s_hold_mixtral_together_and_read_it_once(
    context: int, first: list[list[int]], walks: int
) -> None:
    plan = plan_generation(cards(2), trials(context), ARMS)
    assert [stage.layers for stage in plan.stages] == [range(16), range(16, 32)]
    assert all(stage.resident for stage in plan.stages)
    assert all(stage.plan.device_bytes <= 14 * GIB for stage in plan.stages)
    weights = sum(spec.nbytes for spec in SPECS)
    # the walks over the weights, 15 and the first ones for each unit of 12 tiles, copy them once
    assert sum(sum(stage.plan.copies) for stage in plan.stages) == weights
    assert sum(stage.plan.bytes_to_read for stage in plan.stages) == sum(
        spec.stored_bytes for spec in SPECS
    )
    assert [[len(tiles) for tiles in unit.first] for unit in plan.units] == first
    assert len(plan.stages[0].plan.copies) == plan.walks == walks
    assert plan.offload and plan.lanes == 2
    # tiles of 5 trials in 2 lanes: a prefix exact at 16 bits, K3V2 at 3.5, K4V2 at 4, the first
    # token of both at 16, and then 3 times 76 tokens
    tiles = len(plan.units[0].tiles)
    bits = (context - 60) * (16 + 3.5 + 4) + (12.5 + 12) + 228 * 16
    held = tiles * 2 * 5 * 2 * 32 * 1024 * bits / 8
    assert plan.cache_bytes == int(held)


def test_one_t4_streams_what_does_not_fit() -> None:
    plan = plan_generation(cards(1), trials(2048), ARMS)
    (stage,) = plan.stages
    assert stage.resident and not stage.on_device and stage.plan.device_kept_bytes > 8 * GIB
    assert stage.plan.host_kept_bytes > 0
    assert plan.cache_bytes + stage.plan.host_bytes <= 27 * GIB
    # caches of half of the tiles, so that no weight is read from the disk twice
    assert [[len(tiles) for tiles in unit.first] for unit in plan.units] == [[6], [6]]
    assert sum(stage.plan.reads[1:]) == 0


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 2),
    st.sampled_from([600, 2048, 4096]),
    st.integers(1, 8),
    st.integers(11, 40),
    st.integers(8, 60),
    st.booleans(),
)
def test_what_is_planned_is_within_budgets_and_leaves_no_tile_out(
    count: int, context: int, tiles: int, vram: int, ram: int, led: bool
) -> None:
    rides, lead = trials(context, 5 * tiles), trials(600, 1)[:led]
    try:
        plan = plan_generation(cards(count, vram, ram), rides, ARMS, lead=lead)
    except BudgetError:
        return
    assert [tile for unit in plan.units for tile in unit.tiles] == rides
    for stage in plan.stages:
        assert stage.plan.device_bytes <= vram * GIB
        assert len(stage.plan.copies) == len(stage.plan.reads) == plan.walks
        assert [tile for tiles in stage.plan.sweeps for tile in tiles if tile >= led] == list(
            range(led, tiles + led)
        )
    held = 0 if not plan.offload else plan.cache_bytes
    assert held + sum(stage.plan.host_bytes for stage in plan.stages) <= ram * GIB
    assert count == 1 or all(stage.resident for stage in plan.stages)


def test_cards_that_are_too_small_together() -> None:
    with pytest.raises(NoRoomTogether, match=r"found 2 devices of 12\.00 GiB, 12\.00 GiB"):
        plan_generation(cards(2, vram=12), trials(2048), ARMS)
    with pytest.raises(BudgetError, match="for the keys and values of one tile"):
        plan_generation(cards(1, vram=6, ram=4), trials(4096), ARMS)


def test_a_large_card_keeps_all_and_the_caches_too() -> None:
    plan = plan_generation(cards(1, vram=138), trials(4096), ARMS)
    assert plan.stages[0].resident and not plan.offload and len(plan.units) == 1
    assert "weights in flight" not in plan.stages[0].plan.peaks


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.lists(st.integers(1, 1000), min_size=1, max_size=5),
)
def test_layers_over_devices(sizes: list[int], rooms: list[int]) -> None:
    parts = spread_layers(sizes, rooms)
    if parts is None:  # nor does filling each to the brim
        first = 0
        for device, room in enumerate(rooms):
            used, most = 0, len(sizes) - (len(rooms) - 1 - device)
            while first < most and used + sizes[first] <= room:
                used, first = used + sizes[first], first + 1
            if used == 0:
                return
        assert first < len(sizes)
        return
    assert [layer for part in parts for layer in part] == list(range(len(sizes)))
    assert len(parts) == len(rooms) and all(len(part) for part in parts)
    for part, room in zip(parts, rooms, strict=True):
        assert sum(sizes[layer] for layer in part) <= room


def test_even_devices_get_even_shares() -> None:
    assert spread_layers([10] * 32, [200, 200]) == [range(16), range(16, 32)]
    assert spread_layers([10] * 32, [300, 100]) == [range(24), range(24, 32)]


ARGUMENTS = (
    "--kv", "K3V2,e8:K3V2", "--tasks", "niah", "--niah-mode", "generate", "--niah-context", "384",
    "--niah-depths", "0.3,0.7", "--niah-per-depth", "5",
)  # fmt: skip


def evaluation(*more: str) -> list[str]:
    return tiny_study.words(*ARGUMENTS, *more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "one"
    assert run(evaluation("--device", "cpu", "--out", str(folder))) == 0
    return folder


def performance(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["performance"]
    return found


def test_layers_over_two_devices_give_the_bits_of_one(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    assert run(evaluation("--device", "cpu,cpu", "--out", str(folder))) == 0
    assert numbers(folder) == numbers(alone)
    one, two = performance(alone), performance(folder)
    assert (one["sweeps"], two["sweeps"]) == (
        16,
        32,
    )  # two tiles of 5: together, or one on each stage
    assert two["weight_bytes_read"] == one["weight_bytes_read"]  # each block by one stage, once
    assert one["moved_bytes"] == 0 < two["moved_bytes"]  # hidden states cross between the stages
    assert not (folder / "shards").exists()


def test_a_unit_is_kept_when_it_is_done(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layersweep.generate import lanes

    real, sweeps = lanes.run_sweep, 0

    def sweep(*args: Any, **named: Any) -> Any:
        nonlocal sweeps
        sweeps += 1
        if sweeps > 16 + 3:
            raise KeyboardInterrupt
        return real(*args, **named)

    words = evaluation("--device", "cpu", "--out", str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "run_sweep", sweep)
        # caches of one tile alone fit
        patch.setattr("layersweep.study.study.plan_generation", one_tile_a_unit)
        assert run(words) == 130
    assert run([*words, "--resume"]) == 0
    assert numbers(tmp_path / "run") == numbers(alone)
    assert performance(tmp_path / "run")["resumed_tiles"] == 1


def one_tile_a_unit(
    models: list[Model], tiles: list[Tile], arms: Any, at_least: int, lead: list[Tile]
) -> Generation:
    plan = plan_generation(models, tiles, arms, len(tiles), lead)
    assert len(plan.units) == len(tiles) == 2
    return plan


def test_first_walks_of_a_unit_may_have_a_tile_each(alone: Path, tmp_path: Path) -> None:
    """Memory for the prefixes of one tile, not even the gate's beside it: the further walks have
    both tiles all the same."""
    job = EvalSettings(
        kv="K3V2,e8:K3V2", tasks=("niah",), niah_mode="generate", niah_contexts=(384,),
        niah_depths=(0.3, 0.7), niah_per_depth=5, text=str(tiny_study.text_file()),
    )  # fmt: skip
    study = prepare_study(load(str(tiny_study.model_folder()), device="cpu"), job)
    study.plan_rest(at_least=2)
    decoder, element = study.model.decoder, study.model.machine.element
    shapes = [tile_shape(tile, decoder.query_width) for tile in study.tiles]
    sizes = [tile_bytes(decoder, shape, element) for shape in shapes]
    room = study.plan.device_bytes - study.plan.peaks["hidden states"] + max(sizes)
    words = evaluation("--device", "cpu", "--vram", f"{room}B")
    assert run([*words, "--out", str(tmp_path / "run")]) == 0
    assert numbers(tmp_path / "run") == numbers(alone)
    assert performance(tmp_path / "run")["sweeps"] == 3 + 15


def test_where_a_sweep_was_bad_counts_from_the_first_tile_of_the_unit() -> None:
    whole = SweepRecord(nonfinite={(0, 1, -1): 7})
    whole.add(SweepRecord(nonfinite={(0, 1, -1): 3}), ahead=2)
    whole.add(SweepRecord(nonfinite={(0, 1, -1): 9, (2, 1, -1): 2}))
    assert whole.nonfinite == {(0, 1, -1): 7, (2, 1, -1): 2}


def test_stop_after_ends_between_units(alone: Path, tmp_path: Path) -> None:
    words = evaluation("--device", "cpu", "--out", str(tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layersweep.study.study.plan_generation", one_tile_a_unit)
        assert run([*words, "--stop-after", "0.001s"]) == 0
    stopped = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (stopped["status"], stopped["performance"]["sweeps"]) == ("partial", 16)
    assert run([*words, "--resume"]) == 0
    assert numbers(tmp_path / "run") == numbers(alone)


def test_each_of_two_units_under_way_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units 0 and 1 begin at 0 s; 0 ends after 100 s, where 2 begins, and both others after 150."""
    now, both, third = [0.0], threading.Barrier(2), threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def generate(run: object, number: int) -> None:
        if number < 2:
            both.wait(10)
        if number == 0:
            now[0] = 100.0
        elif number == 1:
            assert third.wait(10)
            now[0] = 150.0
        else:
            third.set()
            assert done[1].wait(10)

    done = [threading.Event() for _ in range(3)]
    three = [SimpleNamespace(tiles=[], first=number) for number in range(3)]
    generation: Any = SimpleNamespace(units=three, walks=3, lanes=2, offload=False)
    engine: Any = SimpleNamespace(compute=load("demo", device="cpu").compute)
    task: Any = SimpleNamespace(new_tokens=1, generate=generate)
    limit = TimeLimit(1000.0)
    took: list[float] = []
    units = generate_units(
        generation, [engine], task, lead=None, progress=lambda *step: None,
        allows_another=limit.allows_another, say=lambda fallback: None,
    )  # fmt: skip
    for number, one in enumerate(units):
        limit.took_one(one.began)
        took.append(now[0] - one.began)
        done[number].set()
    assert (took, limit.longest) == ([100.0, 150.0, 50.0], 150.0)


OWN = f"{Path(__file__).parent / 'own_codec.py'}:Rounded:K3V2"
STEPPED = [EXACT, *parse_arms(f"K3V2,K4V2,lloyd:K3V2@window=3@sink=2,kivi:K2V16,{OWN}")]
JOINED = [
    EXACT,
    *parse_arms("K3V2,K4V2,lloyd:K3V2@sink=2,int4@pb=1,fp8@layers=1,e8:K3V2"),
]  # whatever their lengths


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"))), device="cpu")


def engine_of(model: Model, layers: range) -> Engine:
    specs = blocks_of(model.specs, layers)
    placement = Placement(frozenset(), frozenset(), 0, compute_ring(runs_of(specs)))
    store = BlockStore(specs, placement, torch.device("cpu"))
    return Engine(model.decoder, store, model.compute, 0, layers)


@pytest.fixture(scope="module")
def tiny(tiny_model: Model) -> Iterator[Engine]:
    engine = engine_of(tiny_model, range(tiny_model.decoder.num_hidden_layers))
    yield engine
    engine.close()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4),
    st.sampled_from([STEPPED, JOINED]),
    st.integers(0, 2**32),
)
def test_a_token_at_a_time_is_one_pass(
    tiny: Engine, lengths: list[tuple[int, int]], arms: list[Arm], seed: int
) -> None:
    rides = texts(lengths, len(arms), 3, tiny.decoder.vocab_size, seed)
    expected = in_one_pass(tiny, rides, arms)
    found = stepped(tiny, rides, arms, KeptCaches(3))
    assert found.shape == (len(lengths), len(arms), 4, tiny.decoder.vocab_size)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("arms", [STEPPED, JOINED])
def test_where_caches_wait_and_how_many_arms_go_at_once_changes_no_bit(
    tiny: Engine, arms: list[Arm], monkeypatch: pytest.MonkeyPatch
) -> None:
    rides = texts([(40, 5), (31, 8), (31, 8)], len(arms), 3, tiny.decoder.vocab_size, 0)
    expected = stepped(tiny, rides, arms, KeptCaches(3))
    for room in (2**24, 1000):  # where it is full, memory of their own
        memory = cache_memory(room)
        memory.bytes.fill_(255)  # as others left it: NaN in every type
        caches = KeptCaches(3, memory)
        assert torch.equal(stepped(tiny, rides, arms, caches), expected)
        assert caches.moved_bytes == 0  # nothing leaves the host
        memory.close()
    monkeypatch.setattr("layersweep.sweep.state.STEP_ELEMENTS", 1)
    assert torch.equal(stepped(tiny, rides, arms, KeptCaches(3)), expected)
    monkeypatch.setattr(PlainAttention, "reads_past", True)  # kept keys turned with the prefix's
    assert torch.equal(stepped(tiny, rides, arms, KeptCaches(3)), expected)


def test_prefixes_of_several_lengths_are_joined_as_far_as_one_call_takes(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [(40, 5), (31, 8), (31, 8), (20, 5), (22, 5)]
    rides = texts(lengths, len(JOINED), 2, tiny.decoder.vocab_size, 0)

    def parts() -> list[tuple[int, int, int]]:
        caches = KeptCaches(2)
        stepped(tiny, rides, JOINED, caches)
        kept = caches._layers[0, 1]
        held = {id(s.middle) for part in kept.prefixes for pair in part.store.arms for s in pair}
        # of 5 coded arms' keys and values, K3V2 and K4V2 share one; int4 keeps this layer exact
        assert len(held - {id(None)}) == 9 * len(kept.prefixes)
        return [(part.rows.start, part.rows.stop, part.length) for part in kept.prefixes]

    assert parts() == [(0, 5, 40)]
    monkeypatch.setattr("layersweep.sweep.attention.attention_batch", lambda *of: 3)
    assert parts() == [(0, 3, 40), (3, 5, 22)]


def test_kept_caches_are_copies_that_share_and_do_not_hold_what_they_decode(tiny: Engine) -> None:
    rides = texts([(40, 5), (40, 5), (20, 5)], len(STEPPED), 2, tiny.decoder.vocab_size, 0)
    caches = KeptCaches(2)
    stepped(tiny, rides, STEPPED, caches)
    for layer in range(tiny.decoder.num_hidden_layers):
        kept = caches._layers[0, layer]
        assert [(part.rows.start, part.rows.stop) for part in kept.prefixes] == [(0, 2), (2, 3)]
        for part in kept.prefixes:
            coded = [s.middle for pair in part.store.arms for s in pair if s.middle is not None]
            assert not part.store._decoded
            # 5 arms; values of kivi:K2V16 are exact, those of K3V2 and K4V2 are one
            assert (len(coded), len({id(one) for one in coded})) == (9, 8)


def test_bits_of_arms_that_are_arithmetic_alone() -> None:
    tiles = trials(2048, 10)
    packed = plan_generation(cards(1, 138), tiles, parse_arms("K3V2")).cache_bytes
    simulated = plan_generation(cards(1, 138), tiles, parse_arms("e8:K3V2")).cache_bytes
    assert simulated > 2 * packed


@pytest.mark.parametrize(
    ("options", "exact"), [("@sink=4", 4), ("@window=1000", 1000), ("@pb=4", 2000 / 4),
                           ("@pb=4@window=1000@sink=4", 1004 + 996 / 4),
                            ("@fine=100", 100 * 3 / 12.5),
                            ("@layers=1-24@pb=4", 2000 * 11 / 32)],
)  # fmt: skip
def test_tokens_that_stay_exact_are_planned_at_16_bits(options: str, exact: float) -> None:
    """Of 2000 prefix tokens, on average over 32 layers."""
    tiles = trials(2060)  # 5 trials each
    tokens = 2 * 32 * 8 * 128 * 60  # of a prefix each: elements of the whole job
    plain, kept = (
        plan_generation(cards(1, 138), tiles, parse_arms(f"lloyd:K3V2{suffix}")).cache_bytes
        for suffix in ("", options)
    )
    assert kept - plain == pytest.approx(tokens * exact * (16 - 3.5) / 8, rel=1e-6)


def test_machines_of_several_stages_share_the_host() -> None:
    models = cards(2)
    plan = plan_generation(models, trials(2048), ARMS)
    assert plan.cache_bytes + sum(s.plan.host_bytes for s in plan.stages) <= models[0].ram
    small = [replace(model, ram=4 * GIB) for model in models]
    with pytest.raises(NoRoomTogether):  # the caches have no place
        plan_generation(small, trials(2048), ARMS)


def test_where_the_weights_do_not_fit_together_each_device_has_its_own(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_room(models: list[Model], *rest: Any) -> Generation:
        assert len(models) == 2  # one model each in the processes, which this does not reach
        raise NoRoomTogether("found 2 small devices")

    monkeypatch.setattr("layersweep.study.study.plan_generation", no_room)
    folder = tmp_path / "two"
    assert run(evaluation("--device", "cpu,cpu", "--out", str(folder))) == 0
    said = capfd.readouterr().err
    assert "fallback: layers over devices: used a process for each: found 2 small devices" in said
    assert numbers(folder) == numbers(alone)
    # from the page cache in each of 16 walks, by each of them
    assert performance(folder)["weight_bytes_read"] == 32 * performance(alone)["weight_bytes_read"]


def test_one_lane_launches_at_a_time_and_another_while_it_waits() -> None:
    turn, entered = HostTurn(), threading.Event()

    def other() -> None:
        with turn:
            entered.set()

    lane = threading.Thread(target=other)
    with turn:
        lane.start()
        assert not entered.wait(0.05)
        with turn.away():
            assert entered.wait(10)
            lane.join()


def test_another_lane_launches_while_an_engine_is_left(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving joins threads and, on a GPU, waits for the device."""
    turn, stop = HostTurn(), HostStage.stop
    launched: list[bool] = []

    def launch() -> None:
        with turn:
            pass

    def watched(stage: HostStage) -> None:
        lane = threading.Thread(target=launch)
        lane.start()
        lane.join(10)
        launched.append(not lane.is_alive())
        stop(stage)

    monkeypatch.setattr(HostStage, "stop", watched)
    first, second = (engine_of(tiny_model, range(layer, layer + 1)) for layer in range(2))
    tile = Tile("t", (BranchedSequence((), (Branch(EXACT, (1, 2, 3), (0, 2)),)),))
    run_sweep(first, [tile], lambda *read: None, then=[second], turn=turn)
    assert launched == [True, True]
    first.close()
    second.close()


def test_where_memory_ends_there_are_more_units_and_in_the_end_an_error() -> None:
    model = load("demo", device="cpu,cpu", vram="1GiB", ram="4GiB")
    settings = EvalSettings(
        tasks=("niah",), niah_mode="generate", niah_contexts=(512,), niah_per_depth=2
    )
    study = prepare_study(model, settings)
    tiles = len(study.to_generate)
    assert tiles == 4 and study.generation is not None
    assert [len(unit.tiles) for unit in study.generation.units] == [2, 2]
    fallback = shrink(study, "no more")
    assert [len(unit.tiles) for unit in study.generation.units] == [1] * 4
    assert len(study.generation.stages) == 2 and fallback.why == "no more"
    with pytest.raises(MachineError, match="tiles are generated one at a time already"):
        shrink(study, "no more")
