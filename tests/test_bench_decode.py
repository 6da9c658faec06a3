"""`bench decode` and `bench batch`: floors from sizes, what walks are counted as, and peers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkpoint_builders import EXPERTS, HEAD_DIM, KV_HEADS, LAYERS, VOCAB, tiny_checkpoint
from families.oracle import make
from families.table import TINY

from layersweep.bench import ceilings
from layersweep.bench.generate_peer import main as generate_peer
from layersweep.bench.generate_peers import Peers
from layersweep.bench.generation import Load, bench_generation
from layersweep.bench.walks import Costs, Rates, WalkCost, Walks, share_used
from layersweep.cli.app import run
from layersweep.generate.counts import Rider
from layersweep.generate.room import make_room
from layersweep.kv.arms import EXACT, parse
from layersweep.stream.shapes import dense_total
from layersweep.sweep.model import Model, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(str(folder), device="cpu", vram="1GiB", ram="1GiB")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MEMORY_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "CPU_SECONDS", 0.01)


def test_one_stream_adds_up_and_many_take_the_longest() -> None:
    cost, alone, many = WalkCost(200.0, 500.0, 3000.0), Walks(), Walks()
    alone.add(cost, 50, Rates(memory=100.0, bring=10.0, products=None))
    many.add(cost, 50, Rates(memory=100.0, bring=10.0, products=500.0))
    many.add(cost, 0, Rates(memory=100.0, bring=10.0, products=1e9))
    assert alone.floor_s == 50 / 10 + 200 / 100
    assert many.floor_s == 3000 / 500 + 200 / 100
    assert (alone.hit_rate, many.hit_rate) == (0.9, 0.95)
    many.tokens, many.wall_s = 30, 10.0
    assert (many.tokens_per_s, many.share_of_floor) == (3.0, 0.8)


def test_a_row_reads_its_experts_and_many_rows_read_all(model: Model) -> None:
    assert EXPERTS == 4  # two of them for each row
    assert share_used(model.decoder, 1) == 0.5
    assert share_used(model.decoder, 3) == 1 - 0.5**3
    assert share_used(load("demo", device="cpu").decoder, 10**6) == 1.0


def test_what_a_walk_reads(model: Model) -> None:
    """Decoded weights in float32 and exact rows in float32, by hand; codes by their bits."""
    costs = Costs(model, make_room(model, most=2, longest=64), 64)
    experts = sum(spec.shape.elements for spec in model.specs if spec.role == "expert")
    row, token = 4 * model.decoder.hidden_size, LAYERS * 2 * KV_HEADS * HEAD_DIM
    once = dense_total(model.decoder, 4) - 4 * experts // 2 + row
    assert costs.of([Rider(EXACT, 9, 1)]).read_bytes == once + 10 * 4 * token
    coded = costs.of([Rider(parse("lloyd:K4V4"), 9, 1)])
    scales = LAYERS * 2 * KV_HEADS * 2  # float16, of each vector
    assert coded.read_bytes == once + 10 * (token * 4 / 8 + scales)
    assert costs.of([Rider(EXACT, 0, 8)]).read_bytes > once + 4 * experts // 4


def test_many_streams_are_read_and_then_decoded_together(model: Model) -> None:
    said: list[str] = []
    (row,) = bench_generation(model, [EXACT], Load(3, 20, 6), said.append)
    assert said == [
        "measuring memory and products", "exact: warm-up", "exact: measured run",
        "exact: one stream",
    ]  # fmt: skip
    assert (row["prefill"]["tokens"], row["prefill"]["walks"]) == (60, 1)
    assert (row["decode"]["tokens"], row["decode"]["walks"]) == (15, 5)
    assert row["one_stream"]["tokens"] == 5
    assert row["set_back"] == 0  # who may run at once has room until the end
    assert row["decode"]["hit_rate"] == 1.0 and row["decode"]["missed_bytes_per_walk"] == 0
    assert {"attention", "experts", "logits"} <= set(row["decode"]["ms_per_walk"])
    over = row["tokens_per_s"] / row["one_stream"]["tokens_per_s"]
    assert row["over_one_stream"] == pytest.approx(over)
    json.dumps(row, allow_nan=False)


def test_the_command_prints_a_table_and_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--kv", "exact,fp8", "--prompt-tokens", "12", "--new-tokens", "4"]
    memory = ["--vram", "1GiB", "--ram", "1GiB"]
    assert run(["bench", "decode", str(folder), *options, *memory, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert line["bench"] == "decode"
    assert [(row["requested"], row["decode"]["tokens"]) for row in line["rows"]] == [
        ("exact", 3),
        ("fp8", 3),
    ]
    assert "of floor" in err and "  attention" in err


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_makes_as_many_tokens(tmp_path: Path) -> None:
    make(TINY["llama"], tmp_path)
    order = {
        "engine": "transformers", "source": str(tmp_path), "device": "cpu", "dtype": "float32",
        "vocab_size": 32, "streams": 2, "prompt_tokens": 4, "new_tokens": 6, "vram_cap": 0,
    }  # fmt: skip
    answer = generate_peer(order)
    assert answer["quantized"] is False and answer["dtype"] == "float32"
    json.dumps(answer)


def test_peers_that_cannot_run_say_why(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(module: str, name: str, order: dict[str, object]) -> dict[str, object]:
        asked.append((module, name, order["streams"], order["dtype"], order["vocab_size"]))
        return {"prefill_s": 1.0, "decode_s": 2.0}

    monkeypatch.setattr("layersweep.bench.generate_peers.ask_child", ask)
    ours, *others = Peers(model, Load(4, 8, 11)).measured(lambda line: None)
    assert asked == [("generate_peer", "transformers", 4, "float32", VOCAB)]
    assert (ours["job"], ours["tokens_per_s"]) == ("transformers", 4 * 10 / 2.0)
    assert [row["left_out"] for row in others] == [
        "found the CPU, needed a GPU to offload from",
        "found a model that is no .gguf file, needed one",
    ]


def test_prompts_are_the_same_for_any_number_of_streams() -> None:
    one, many = Load(1, 8, 2).prompts(100), Load(3, 8, 2).prompts(100)
    assert many[0] == one[0] and len(many) == 3
    assert all(0 <= token < 100 for ids in many for token in ids)
