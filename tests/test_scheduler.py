"""Requests that run together: each gets the tokens that it gets alone, which are transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_builders import tiny_checkpoint
from families.oracle import make, opened
from families.table import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_models import oracle_model
from test_sweep import random_ids
from torch import Tensor

from layersweep.environment import Budget
from layersweep.errors import InputError
from layersweep.generate.request import Output, Request, Sampling
from layersweep.generate.room import make_room
from layersweep.generate.scheduler import Scheduler
from layersweep.integrations.transformers import cache_for
from layersweep.kv.arms import EXACT, Arm, parse
from layersweep.model.compute import Compute
from layersweep.stream.shapes import positions_at_once
from layersweep.sweep import engine, running, running_attention
from layersweep.sweep.context import RopeTables
from layersweep.sweep.loop import run_sweep
from layersweep.sweep.model import Model, load
from layersweep.sweep.running import RunningCaches, Text, capacity_for

LENGTHS = (1, 40, 60, 40)  # one token, equal ones, one that outgrows its row
NEW = 8


def requests(
    vocab: int, arm: Arm = EXACT, lengths: Sequence[int] = LENGTHS, new: int = NEW
) -> list[Request]:
    sampling = Sampling(max_new_tokens=new, ignore_eos=True)
    return [
        Request(str(at), random_ids(length, vocab, at), sampling, arm)
        for at, length in enumerate(lengths)
    ]


def drive(scheduler: Scheduler, asked: Sequence[Request]) -> dict[str, list[Output]]:
    """The outputs of each, all submitted at once."""
    found: dict[str, list[Output]] = {request.id: [] for request in asked}
    for request in asked:
        scheduler.check(request)
        scheduler.submit(request)
    while not scheduler.idle:
        for output in scheduler.step():
            found[output.request].append(output)
    return found


def tokens(found: dict[str, list[Output]]) -> dict[str, list[int | None]]:
    return {name: [output.token for output in outputs] for name, outputs in found.items()}


def greedy(
    model: torch.nn.Module, ids: Sequence[int], new: int, kv: str | None = None
) -> list[int]:
    """transformers' tokens, fed one at a time."""
    cache = cache_for(model, kv) if kv else None
    x, made = torch.tensor([ids]), list[int]()
    with torch.inference_mode():
        for _ in range(new):
            given = model(x, past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            made.append(int(given.logits[0, -1].argmax()))
            x = torch.tensor([made[-1:]])
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load(str(tiny), device="cpu")


KINDS = (
    *("llama", "llama:yarn", "mistral", "gemma2", "gemma3_text", "phi3:longrope", "smollm3"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_attention_gives_the_tokens_of_transformers(
    name: str, tmp_path: Path
) -> None:
    make(TINY[name], tmp_path)
    loaded, oracle = load(str(tmp_path), device="cpu"), opened(tmp_path)
    asked = requests(loaded.decoder.vocab_size)
    with Scheduler(loaded, most=8, longest=128) as scheduler:
        found = tokens(drive(scheduler, asked))
    counts = scheduler.counts
    made = len(LENGTHS) * NEW
    assert (counts.walks, counts.prompt_tokens, counts.tokens) == (NEW, sum(LENGTHS), made)
    assert found == {request.id: greedy(oracle, request.ids, NEW) for request in asked}


@pytest.mark.parametrize(
    "kv",
    [
        *("lloyd:K3V2", "lloyd:K4V4@window=6@sink=2", "lloyd:K2V16", "lloyd:K3V2@layers=1"),
        *("fp8", "kivi:K2V16", "trellis:K4V2", "K3V2@fit=0"),
    ],
)
def test_an_arm_gives_the_tokens_of_its_cache_in_transformers(
    kv: str, tiny: Path, model: Model
) -> None:
    arm, oracle = parse(kv, growing=True), oracle_model(tiny)
    lengths = (170, 145) if arm.block else LENGTHS  # a block is coded from 128 tokens on
    asked = requests(model.decoder.vocab_size, arm, lengths)
    with Scheduler(model, most=8, longest=256) as scheduler:
        found = tokens(drive(scheduler, asked))
    assert found == {request.id: greedy(oracle, request.ids, NEW, kv) for request in asked}
    exact = {request.id: greedy(oracle, request.ids, NEW) for request in asked}
    assert found != exact


@pytest.mark.parametrize("kv", ["exact", "K3V2", "lloyd:K3V2@window=4"])
def test_company_and_being_set_back_change_no_token(kv: str, model: Model) -> None:
    asked = requests(model.decoder.vocab_size, parse(kv, growing=True), new=24, lengths=(1, 70, 45))
    with Scheduler(model, most=8, longest=256) as scheduler:
        together = tokens(drive(scheduler, asked))
        alone = [tokens(drive(scheduler, [request])) for request in asked]
        assert scheduler.counts.set_back == 0
    assert {name: made for one in alone for name, made in one.items()} == together
    with Scheduler(model, most=8, longest=256) as scheduler:
        kept = running.row_bytes(model.decoder, 262, 4)  # until the last needs a longer row
        scheduler.room = replace(scheduler.room, kept_bytes=kept, host_bytes=10 * kept)
        assert tokens(drive(scheduler, asked)) == together
        assert scheduler.counts.set_back > 0
    if kv == "exact":  # nothing waits in host memory: texts are read anew
        with Scheduler(model, most=8, longest=256) as scheduler:
            scheduler.room = replace(scheduler.room, kept_bytes=kept, host_bytes=0)
            assert tokens(drive(scheduler, asked)) == together
            assert scheduler.counts.set_back > 0


def test_prompts_beyond_a_walk_are_read_in_pieces(tiny: Path, model: Model) -> None:
    asked = requests(model.decoder.vocab_size, lengths=(100, 3, 65))
    with Scheduler(model, most=8, longest=200) as scheduler:
        scheduler.room = replace(scheduler.room, rows=32)
        found = tokens(drive(scheduler, asked))
        assert scheduler.counts.walks > NEW + 2
    oracle = oracle_model(tiny)
    assert found == {request.id: greedy(oracle, request.ids, NEW) for request in asked}


def test_a_streamed_model_gives_the_tokens_of_a_resident_one(tmp_path: Path) -> None:
    make(TINY["llama"], tmp_path)
    model = load(str(tmp_path), device="cpu")
    asked = requests(model.decoder.vocab_size)
    with Scheduler(model, most=8, longest=128) as scheduler:
        resident = tokens(drive(scheduler, asked))
        assert (scheduler.room.plan.host, scheduler.room.keeps_dense) == ("resident", True)
        least = scheduler.room.plan.placement.host_ring
    streamed = replace(model, ram=Budget(least + 2**10, "test"))
    with Scheduler(streamed, most=8, longest=128) as scheduler:
        assert scheduler.room.plan.host == "disk"
        assert tokens(drive(scheduler, asked)) == resident
        assert scheduler.counts.weight_bytes_read > (NEW - 1) * sum(
            s.stored_bytes for s in model.specs
        )


@pytest.mark.parametrize("together", [2, 3, 4])
def test_experts_that_are_decoded_together_stay_who_they_are(
    together: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group whose first expert has rows again, but others beside it than before."""
    asked = requests(model.decoder.vocab_size, lengths=(1, 3), new=24)
    with Scheduler(model, most=8, longest=128) as scheduler:
        expected = tokens(drive(scheduler, asked))
    for module in ("layersweep.sweep.visits", "layersweep.stream.shapes"):
        monkeypatch.setattr(f"{module}.experts_at_once", lambda *layer, cpu: together)
    with Scheduler(model, most=8, longest=128) as scheduler:
        assert scheduler.room.keeps_dense
        assert tokens(drive(scheduler, asked)) == expected


def test_tables_of_rope_that_are_made_anew_change_no_token(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = requests(model.decoder.vocab_size, lengths=(5, 9), new=30), list[int]()
    with Scheduler(model, most=8, longest=128) as scheduler:
        expected = tokens(drive(scheduler, asked))

    def counted(longest: int, compute: Compute) -> RopeTables:
        made.append(longest)
        return RopeTables(longest, compute)

    monkeypatch.setattr(engine, "TABLE_STEP", 16)
    monkeypatch.setattr(engine, "RopeTables", counted)
    with Scheduler(model, most=8, longest=128) as scheduler:
        assert tokens(drive(scheduler, asked)) == expected
    assert made == [16, 32, 48]


def test_a_plan_has_memory_for_the_logits_that_are_read_together(model: Model) -> None:
    """Of 48 requests, float32 over a vocabulary that outweighs all else; and of the 64 rows that
    go through the head at once at least, where every row is wanted."""
    decoder = replace(model.decoder, vocab_size=2**21)
    checkpoint, vram = replace(model.checkpoint, decoder=decoder), Budget(2**36, "test")
    wide = replace(model, checkpoint=checkpoint, vram=vram)
    row = 4 * decoder.vocab_size
    at_once = positions_at_once(1, decoder.vocab_size)
    assert at_once == 64
    for every_row, rows in ((False, 48), (True, 64)):
        room = make_room(wide, most=48, longest=512, every_row=every_row)
        assert rows * row < room.plan.scratch < (rows + 1) * row


def test_requests_come_and_go(model: Model) -> None:
    first, second, third = requests(model.decoder.vocab_size, lengths=(5, 9, 12))
    with Scheduler(model, most=2, longest=128) as scheduler:
        expected = {one.id: tokens(drive(scheduler, [one]))[one.id] for one in (first, third)}
        for request in (first, second, third):
            scheduler.submit(request)
        found: dict[str, list[Output]] = {one.id: [] for one in (first, second, third)}
        for at in range(3):
            for output in scheduler.step():
                found[output.request].append(output)
            assert (scheduler.running, scheduler.waiting) == (2, 1), at
        scheduler.cancel(second.id)
        scheduler.cancel("nobody")
        while not scheduler.idle:
            for output in scheduler.step():
                found[output.request].append(output)
        assert [output.finish for output in found[second.id]] == [None, None, None, "cancelled"]
        for one in (first, third):
            assert [output.token for output in found[one.id]] == expected[one.id]
            assert found[one.id][-1].finish == "length"


def test_broken_numbers_of_one_request_end_that_request_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(model.decoder.vocab_size, lengths=(5, 9, 12))
    with Scheduler(model, most=4, longest=128) as scheduler:
        expected = tokens(drive(scheduler, asked))
        put, steps = running_attention._put, 0

        def spoil(held: Sequence[Tensor], rows: running.Rows, new: Sequence[Tensor]) -> None:
            """The second text's value of the fourth step in the first layer is NaN."""
            nonlocal steps
            steps += 1
            put(held, rows, new)
            if steps == 4 * model.decoder.num_hidden_layers + 1:
                held[1][1, :, rows.ends[1]] = torch.nan

        monkeypatch.setattr(running_attention, "_put", spoil)
        found = drive(scheduler, asked)
        assert [output.finish for output in found["1"]] == [*[None] * 5, "error"]
        assert found["1"][-1].error == "non-finite numbers from layer 0 on"
        for name in ("0", "2"):
            assert [output.token for output in found[name]] == expected[name]
        again = drive(scheduler, [Request("3", asked[0].ids, asked[0].sampling)])
        assert tokens(again)["3"] == expected["0"]  # its row was the broken one's


@pytest.mark.parametrize("kv", ["exact", "lloyd:K3V2@window=4"])
def test_memory_that_ends_in_a_walk_costs_no_token(
    kv: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(model.decoder.vocab_size, parse(kv), lengths=(5, 9, 12))
    with Scheduler(model, most=4, longest=128) as scheduler:
        expected, told = tokens(drive(scheduler, asked)), []
        before = scheduler.room.kept_bytes
        sweep, walks = run_sweep, 0

        def fail_in_the_third(*args: object, **more: object) -> object:
            nonlocal walks
            walks += 1
            if walks == 3:
                sweep(*args, **more)  # type: ignore[arg-type]  # as far as it came
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return sweep(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr("layersweep.generate.walk.run_sweep", fail_in_the_third)
        monkeypatch.setattr(scheduler, "_say", told.append)
        found = tokens(drive(scheduler, asked))
        assert found == expected or kv != "exact"
        assert {len(made) for made in found.values()} == {NEW}
        assert scheduler.room.kept_bytes < before
        assert [fallback.why for fallback in told] == ["CUDA out of memory"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", ()), "prompt: found no tokens"),
        (Request("a", (1,) * 128), "found 128 tokens, needed fewer than 128"),
        (Request("a", (1, 999)), "found token id 999, needed ids from 0 to"),
        (Request("a", (1, -1)), "found token id -1, needed ids from 0 to"),
        (Request("a", (1,), Sampling(max_new_tokens=0)), "max_new_tokens"),
        (Request("a", (1,), arm=parse("K3V2@layers=0-9")), "found @layers=0-9"),
    ],
)
def test_what_can_never_run_is_refused(request_: Request, message: str, model: Model) -> None:
    with Scheduler(model, most=2, longest=128) as scheduler:
        with pytest.raises(InputError, match=message):
            scheduler.check(request_)
        assert scheduler.idle


def test_a_text_ends_at_the_longest_that_was_allowed(model: Model) -> None:
    asked = Request("a", random_ids(100, 128, 1), Sampling(max_new_tokens=99, ignore_eos=True))
    with Scheduler(model, most=2, longest=128) as scheduler:
        (outputs,) = drive(scheduler, [asked]).values()
    assert len(outputs) == 28
    assert outputs[-1].finish == "length"


class Shelves:
    """RunningCaches beside a dict of what each text should have."""

    def __init__(self) -> None:
        self.caches = RunningCaches(torch.device("cpu"))
        self.kept: dict[Text, list[float]] = {}

    def grow(self, texts: Sequence[Text], value: float) -> None:
        """As a walk does it: room for all of them first, then a token each."""
        for text in texts:
            self.caches.make_room(text, text.end + 1)
        for text in texts:
            shelf = self.caches.at[text]
            (view,) = shelf.views(0, [torch.empty(1, 1, 1, 1)])
            view[shelf.texts.index(text), 0, text.end] = value
            self.kept[text].append(value)
        for text in texts:
            text.end += 1

    def check(self) -> None:
        for text, values in self.kept.items():
            shelf = self.caches.at.get(text)
            if shelf is not None:
                assert shelf.capacity == capacity_for(text.end, text.reach) or text.end < 65
                (view,) = shelf.views(0, [torch.empty(1, 1, 1, 1)])
                row = view[shelf.texts.index(text), 0]
                assert row[: text.end].flatten().tolist() == values
                assert not row[text.end :].any()
        for shelf in self.caches.shelves.values():
            assert len(shelf.texts) == len(set(shelf.texts))


MOVES = st.tuples(
    st.sets(st.integers(0, 7), min_size=1), st.sampled_from(["grow", "jump", "aside", "leave"])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(MOVES))
def test_rows_stay_with_their_texts(moves: list[tuple[set[int], str]]) -> None:
    shelves, texts = Shelves(), [Text(EXACT, 256, 1) for _ in range(8)]
    shelves.kept = {text: [] for text in texts}
    for count, (which, move) in enumerate(moves):
        some = [texts[at] for at in sorted(which)]
        if move in ("leave", "aside"):
            for text in some:
                shelves.caches.leave(text, aside=move == "aside")
                if move == "leave":
                    text.forget()
                    shelves.kept[text] = []
        else:
            for _ in range(30 if move == "jump" else 1):
                shelves.grow([text for text in some if text.end < 256], count + 1.0)
        shelves.check()


def test_texts_that_outgrow_a_shelf_together_spoil_no_other() -> None:
    """Each leaves while a text that came for this walk has no row yet."""
    shelves, texts = Shelves(), [Text(EXACT, 256, 1) for _ in range(6)]
    shelves.kept = {text: [] for text in texts}
    for at in range(64):
        shelves.grow(texts[:5], at + 1.0)
    shelves.grow([texts[5], texts[1], texts[0]], 99.0)  # one comes, two go on to a longer shelf
    shelves.check()
