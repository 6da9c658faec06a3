"""The sweep against transformers, and against itself under every placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from oracle_models import oracle_model, scored_with_cache
from torch import Tensor

from layersweep.errors import BudgetError, InputError
from layersweep.kv import parse
from layersweep.kv.arms import EXACT, Arm
from layersweep.model.attention import Pair, PlainAttention
from layersweep.model.ops import TorchOps
from layersweep.stream.blocks import Block
from layersweep.stream.runs import Placement, choose_spread, compute_ring, runs_of
from layersweep.stream.store import BlockStore
from layersweep.sweep.dense import DenseWeights
from layersweep.sweep.engine import Engine
from layersweep.sweep.feed import FeedVisit
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model, load
from layersweep.sweep.record import Pieces, joined
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile, tiles_of
from layersweep.sweep.state import pieces_of

LAYOUTS = [
    {"layout": "per_expert", "weights": "nf4", "nested": True, "router": "nf4", "shards": 3},
    {"layout": "per_expert", "weights": "nf4", "nested": False, "router": "float"},
    {"layout": "gate_proj", "weights": "nf4", "nested": True, "router": "float"},
    {"layout": "per_expert", "weights": "mixed"},
    {"layout": "per_expert", "weights": "bf16"},
    {"layout": "fused", "weights": "bf16"},
    {"layout": "fused", "weights": "f32"},
    {"layout": "fused", "weights": "nf4", "nested": True, "router": "nf4", "shards": 3},
    {"layout": "fused", "weights": "nf4", "nested": False, "router": "float"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def random_ids(count: int, vocab: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocab, (count,), generator=generator).tolist())


def windows(model: Model, count: int, arms: list[Arm], prefix: int = 40) -> list[BranchedSequence]:
    vocab = model.checkpoint.decoder.vocab_size
    rides = []
    for index in range(count):
        ids = random_ids(prefix + 24, vocab, index)
        branches = tuple(Branch(arm, ids[prefix:], (0, 23)) for arm in arms)
        rides.append(BranchedSequence(ids[:prefix], branches))
    return rides


def sweep_logits(
    model: Model,
    tiles: list[Tile],
    *,
    resident: int = 0,
    sweeps: int = 1,
    ring: int | None = None,
    reference: tuple[int, ...] = (),
) -> tuple[dict[int, list[Tensor]], BlockStore]:
    """{sequence index: logits per branch}, and the store after `sweeps` equal sweeps' tiles."""
    found: dict[int, list[Tensor]] = {}

    def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        found[tile.first + number] = joined(pieces)

    runs = runs_of(model.specs)
    placement = Placement(
        device=frozenset(),
        host=choose_spread([run.nbytes for run in runs], resident),
        device_ring=0,
        host_ring=compute_ring(runs) if ring is None else ring,
    )
    store = BlockStore(model.specs, placement, torch.device("cpu"))
    engine = Engine(model.checkpoint.decoder, store, model.compute, 0, reference=reference)
    for number in range(sweeps):
        run_sweep(engine, tiles[number::sweeps], read)
    engine.close()
    return found, store


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_log_probabilities_equal_transformers_for_every_layout(
    kind: dict[str, object], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, **kind)
    sequences = [random_ids(count, 128, count) for count in (2, 33, 90)]
    scores = load(str(folder), device="cpu").score(sequences)
    oracle = oracle_model(folder)
    for ids, score in zip(sequences, scores, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([ids])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert score.dtype == torch.float32
        assert (score - expected).abs().max() < 1e-4


def test_a_sequence_beyond_the_models_limit_is_refused(tiny: Path) -> None:
    model, field = load(str(tiny), device="cpu"), "max_position_embeddings"
    decoder = replace(model.decoder, max_position_embeddings=32)
    model = replace(model, checkpoint=replace(model.checkpoint, decoder=decoder))
    assert [len(score) for score in model.score([random_ids(32, 128, 0)])] == [31]
    with pytest.raises(InputError, match=f"found 33 tokens, needed at most 32.*{field}") as refused:
        model.score([random_ids(count, 128, 0) for count in (20, 33, 25)])
    assert refused.value.hint == "cut it into pieces: up to 32 tokens"


def test_a_past_that_is_read_where_it_lies_changes_no_number(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of arms that keep it in one piece, and in two. Queries turn at once, and so do exact keys."""
    model = load(str(tiny), device="cpu")
    arms = [EXACT, parse("lloyd:K3V2"), parse("lloyd:K3V2@sink=3")]
    tiles = [Tile("t", tuple(windows(model, 2, arms)))]
    wanted, _ = sweep_logits(model, tiles)
    lengths: list[tuple[int, int]] = []

    class Parted(PlainAttention):
        reads_past = True

        def __call__(self, *args: Tensor, past: Pair | None = None, **others: Any) -> Tensor:
            if past is not None:
                lengths.append((past[0].shape[2], args[1].shape[2]))
            return super().__call__(*args, past=past, **others)

    turned: list[tuple[int, int]] = []
    real = TorchOps.rope

    def rope(ops: TorchOps, x: Tensor, *args: Any, **others: Any) -> Tensor:
        turned.append((x.shape[1], x.shape[2]))
        return real(ops, x, *args, **others)

    monkeypatch.setattr(TorchOps, "rope", rope)
    parted = replace(model, compute=replace(model.compute, attention=Parted()))
    found, _ = sweep_logits(parted, tiles)
    for sequence, logits in wanted.items():
        for one, other in zip(found[sequence], logits, strict=True):
            assert torch.equal(one, other)
    assert lengths == [(40, 24)] * 3 * model.decoder.num_hidden_layers
    heads, own = (4, 2), 40 + 3 * 24
    past = [(heads[1], tokens) for tokens in (40, 40, 3, 37)]
    every = [(heads[0], own), (heads[1], own), *past]
    assert turned == every * model.decoder.num_hidden_layers


@pytest.mark.parametrize("name", ["lloyd:K3V2", "lloyd:K1V16", "e8:K4V2", "e8:K3V2@v=0.5",
                                  "lloyd:K2V2@pb=1", "lloyd:K2V2@window=7@sink=3",
                                  "lloyd:K2V2@layers=1", "identity:lloyd"])  # fmt: skip
def test_branch_equals_transformers_with_an_overwritten_cache(name: str, tiny: Path) -> None:
    model = load(str(tiny), device="cpu")
    arm = parse(name)
    ride = windows(model, 1, [EXACT, arm])[0]
    logits, _ = sweep_logits(model, [Tile("t", (ride,))])
    branch = list(ride.branches[0].ids)
    oracle = oracle_model(tiny)
    layers = model.checkpoint.decoder.num_hidden_layers

    def through(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        from layersweep.kv.store import KvStore
        from layersweep.kv.stream import keys_and_values

        streams = keys_and_values(keys.shape[1], keys.shape[3])
        store = KvStore.empty([(arm, streams)], layer, layers).appended((keys, values))
        decoded_keys, decoded_values = store.decoded(0)
        return decoded_keys, decoded_values

    target = torch.tensor(branch[1:])[:, None]
    for index, transform in ((0, None), (1, through)):
        ours = logits[0][index].log_softmax(-1).gather(1, target)[:, 0]
        theirs = scored_with_cache(oracle, list(ride.prefix), branch, transform)
        assert (ours - theirs).abs().max() < 1e-4, (name, index)


def test_all_layers_named_are_all_layers_and_none_but_one_leave_the_others_exact(
    tiny: Path,
) -> None:
    """The last layer's error reaches no key of another: each layer alone, then both."""
    model = load(str(tiny), device="cpu")
    names = ("K2V2", "K2V2@layers=0-1", "K2V2@layers=0", "K16V2@layers=1")
    arms = [EXACT, *(parse(f"lloyd:{name}") for name in names)]
    logits, _ = sweep_logits(model, [Tile("t", tuple(windows(model, 1, arms)))])
    exact, coded, both, *alone = logits[0]
    assert torch.equal(coded, both)
    assert all(not torch.equal(part, other) for part in alone for other in (exact, coded))


def test_numbers_do_not_depend_on_placement_or_number_of_sweeps(tiny: Path) -> None:
    model = load(str(tiny), device="cpu")
    tiles = tiles_of("t", windows(model, 7, [EXACT, parse("K3V2")]), 2)
    everything = sum(spec.nbytes for spec in model.specs)
    streamed, store = sweep_logits(model, tiles)
    assert store.bytes_read == sum(spec.stored_bytes for spec in model.specs)
    for resident, sweeps in ((everything, 1), (everything, 4), (everything // 2, 2), (0, 3)):
        other, again = sweep_logits(model, tiles, resident=resident, sweeps=sweeps)
        assert streamed.keys() == other.keys()
        for index, parts in streamed.items():
            assert all(torch.equal(a, b) for a, b in zip(parts, other[index], strict=True))
        if resident == everything:
            assert again.bytes_read == store.bytes_read  # once, however many sweeps
        elif not resident:
            assert again.bytes_read == sweeps * store.bytes_read


def test_one_read_of_the_weights_whatever_the_number_of_arms(tiny: Path) -> None:
    model = load(str(tiny), device="cpu")
    reads = []
    for arms in ([EXACT], [EXACT, *(parse(f"K{k}V{v}") for k in (2, 3, 4) for v in (2, 4))]):
        _, store = sweep_logits(model, tiles_of("t", windows(model, 3, arms), 20))
        reads.append(store.bytes_read)
    companions = sum(w.storage.other_nbytes for w in model.checkpoint.weights.values())
    assert reads == [model.checkpoint.nbytes - companions] * 2


def test_exact_against_exact_is_zero_with_one_arm_or_five(tiny: Path) -> None:
    model = load(str(tiny), device="cpu")
    five = [parse(name) for name in ("K3V2", "K4V2", "e8:K3V2", "K1V1", "K8V8")]
    baseline = None
    for arms in ([EXACT, EXACT], [EXACT, *five, EXACT]):
        logits, _ = sweep_logits(model, tiles_of("t", windows(model, 5, arms), 2))
        for parts in logits.values():
            assert torch.equal(parts[0], parts[-1])
        exact = [parts[0] for _, parts in sorted(logits.items())]
        if baseline is not None:
            assert all(torch.equal(a, b) for a, b in zip(exact, baseline, strict=True))
        baseline = exact


@pytest.mark.parametrize("at_once", [1, 5, 31])
def test_logits_in_pieces_are_those_of_all_positions(
    at_once: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(tiny), device="cpu")
    tiles = tiles_of("t", windows(model, 2, [EXACT, parse("K3V2")]), 2)
    whole, _ = sweep_logits(model, tiles)
    positions = len(whole[0][0])
    monkeypatch.setattr("layersweep.stream.shapes.FEWEST_POSITIONS", at_once)
    monkeypatch.setattr("layersweep.stream.shapes.LOGITS_BYTES", 0)
    seen: list[slice] = []

    def read(tile: Tile, number: int, sequence: BranchedSequence, pieces: Pieces) -> None:
        start = 0
        for at, logits in pieces:
            seen.append(at)
            for found, expected in zip(logits, whole[number], strict=True):
                assert len(found) <= at_once
                assert (found - expected[at]).abs().max() < 1e-5
            start += len(logits[0])
        assert start == positions

    model.run(tiles, read)
    assert len(seen) == 2 * -(-positions // at_once)


@given(
    ranges=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=4),
    at_once=st.integers(1, 25),
)
def test_pieces_have_every_row_once(ranges: list[tuple[int, int]], at_once: int) -> None:
    rows = [(first, first + count) for first, count in ranges]
    pieces = list(pieces_of(rows, at_once))
    for branch, (first, last) in enumerate(rows):
        found = [range(*cut[branch]) for _, cut in pieces]
        assert [row for part in found for row in part] == list(range(first, last))
        assert all(len(part) <= at_once for part in found)


def test_streaming_reads_every_token_through_the_codec(tiny: Path) -> None:
    """Oracle: the same layer with keys and values replaced, computed by transformers' own code
    through a cache that codes all that enters it, one token at a time."""
    model = load(str(tiny), device="cpu")
    ids = random_ids(30, 128, 5)
    arm = parse("lloyd:K3V2")
    rides = [
        BranchedSequence((), (Branch(a, ids, (0, 29), streaming=True),))
        for a in (
            EXACT,
            arm,
            replace(arm, window=30, name="w30"),
            replace(arm, window=6, name="w6"),
        )
    ]
    logits, _ = sweep_logits(model, [Tile("t", tuple(rides))])
    exact, coded, all_exact, windowed = (logits[index][0] for index in range(4))
    assert (exact - all_exact).abs().max() < 1e-4
    assert (exact - coded).abs().max() > 1e-3
    # the first 6 tokens of a window of 6 see exact keys and values alone
    assert (exact[:6] - windowed[:6]).abs().max() < 1e-4
    assert (exact[6:] - windowed[6:]).abs().max() > 1e-3
    # token 0 reads only its own decoded value: a one-token streaming run gives the same
    alone, _ = sweep_logits(
        model, [Tile("t", (BranchedSequence((), (Branch(arm, ids[:1], (0, 1), True),)),))]
    )
    assert (alone[0][0] - coded[:1]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("lloyd:K2V2", 75),
        ("lloyd:K2V2@window=5@sink=3", 75),
        ("kivi:K2V16", 75),
        ("kivi:K2V16@window=5@sink=3", 75),
        ("kivi:K2V16@residual=32", 75),
        ("kvarn:K4V2@group=64@sink=2", 75),
        ("lloyd:K2V2@fine=20@sink=1", 75),
        ("lloyd:K2V2@window=5@block=16@fine=40@sink=1", 170),
    ],
)
def test_streaming_equals_a_cache_that_grows_token_by_token(
    name: str, tokens: int, tiny: Path
) -> None:
    """kivi's groups of keys count from when they are full, for the sweep as for a serving cache."""
    from layersweep.integrations.transformers import cache_for

    ids = random_ids(tokens, 128, 5)
    ride = BranchedSequence((), (Branch(parse(name), ids, (0, tokens), streaming=True),))
    logits, _ = sweep_logits(load(str(tiny), device="cpu"), [Tile("t", (ride,))])
    oracle = oracle_model(tiny)
    cache = cache_for(oracle, name)
    with torch.inference_mode():
        steps = [oracle(torch.tensor([[i]]), past_key_values=cache).logits[0, -1] for i in ids]
    assert (logits[0][0] - torch.stack(steps)).abs().max() < 1e-3


def test_a_ring_below_one_layer_and_two_runs_is_refused(tiny: Path) -> None:
    model = load(str(tiny), device="cpu")
    runs = runs_of(model.specs)
    needed = min(compute_ring(runs), sum(run.nbytes for run in runs))
    with pytest.raises(BudgetError, match="one layer and two runs"):
        sweep_logits(model, [Tile("t", (windows(model, 1, [EXACT])[0],))], ring=needed - 1)


def test_weights_nf4_quantizes_a_float_checkpoint_while_it_is_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, weights="bf16")
    plain, small = (load(str(folder), device="cpu", weights=w) for w in ("native", "nf4"))
    expert = next(i for i, s in enumerate(plain.specs) if s.name == "layers.0.experts.0")
    assert small.specs[expert].nbytes < 0.35 * plain.specs[expert].nbytes
    ids = random_ids(40, 128, 1)
    exact, coarse = plain.score([ids])[0], small.score([ids])[0]
    assert 1e-4 < (exact - coarse).abs().max() < 2.0


def test_one_dense_expert_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert of every layer is dequantized into the same memory, once per sweep."""
    model = load(str(tiny), device="cpu")
    filled: list[tuple[int, str]] = []
    fill = DenseWeights.fill_feeds

    def spy(weights: DenseWeights, blocks: Sequence[Block]) -> None:
        fill(weights, blocks)
        for dense, block in zip(weights.feeds["gate_up_proj"], blocks, strict=True):
            filled.append((dense.data_ptr(), block.spec.name))

    monkeypatch.setattr(DenseWeights, "fill_feeds", spy)
    sweep_logits(model, tiles_of("t", windows(model, 5, [EXACT, parse("K3V2")]), 2))
    assert len({memory for memory, _ in filled}) == 1
    names = [f"layers.{layer}.experts.{expert}" for layer in range(2) for expert in range(4)]
    assert [name for _, name in filled] == names


@pytest.mark.parametrize("count", [2, 3, 4])
def test_experts_in_groups_give_the_same_numbers(
    count: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where small experts share their launches: bit for bit."""
    model = load(str(tiny), device="cpu")
    tiles = tiles_of("t", windows(model, 5, [EXACT, parse("K3V2")]), 2)
    alone, _ = sweep_logits(model, tiles)
    visited = []
    together = FeedVisit._together
    monkeypatch.setattr(
        FeedVisit, "_together", lambda self, *rest: visited.append(together(self, *rest))
    )
    for module in ("layersweep.sweep.visits", "layersweep.stream.shapes"):
        monkeypatch.setattr(f"{module}.experts_at_once", lambda *shape, cpu: count)
    grouped, _ = sweep_logits(model, tiles)
    assert len(visited) == 2 * 3 * {2: 2, 3: 1, 4: 1}[count]  # layers, tiles, groups
    for index, branches in alone.items():
        assert all(map(torch.equal, branches, grouped[index]))
