"""lm-evaluation-harness: three local tasks against its own HF backend on transformers' model, arms
against a cache that is overwritten, and one sweep for all arms."""

from __future__ import annotations

import functools
import importlib
import json
import runpy
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_models import (
    codec_of,
    oracle_model,
    rope_tables,
    rotate_half,
    scored_with_cache,
)
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from layersweep.cli.app import run
from layersweep.errors import GateError, InputError
from layersweep.generate.request import Sampling
from layersweep.sweep.model import load
from layersweep.sweep.record import SweepRecord

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from layersweep.integrations.lm_eval import evaluate as evaluation
from layersweep.integrations.lm_eval import scoring
from layersweep.integrations.lm_eval.compare import ANSWER_NLL, differences
from layersweep.integrations.lm_eval.evaluate import Asked, evaluate, load_tasks, rows_of
from layersweep.integrations.lm_eval.generation import Context, numbered, sampling_of
from layersweep.integrations.lm_eval.harness import Harness, _tokenizer
from layersweep.integrations.lm_eval.lm import LayersweepLM
from layersweep.integrations.lm_eval.scoring import (
    EXACT_CACHE,
    Scored,
    Scores,
    _ill,
    harness_arms,
    rides_of,
    tiles_of_rides,
)

Json = dict[str, Any]
PROJECT = Path(__file__).parents[1]
DEMO, TOOLS = PROJECT / "src/layersweep/demo/model", PROJECT / "tools"
LIMIT = 96  # tokens: some contexts and all texts are longer
ARMS = ("exact", "lloyd:K3V2", "lloyd:K4V2")
TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until", "doc_to_text": "import {{question}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n", ")"], "max_gen_toks": 12},
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """lm-eval asks pip and the compiler for their versions in every run, a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks' YAML (JSON is YAML) and their documents."""
    path = tmp_path_factory.mktemp("tasks")
    text = (DEMO.parent / "text/heldout.txt").read_text("utf-8")
    parts = [part for part in text.split("\n\n") if 150 < len(part) < 500]
    docs = [
        {
            "question": part[:100] if number else "",  # an empty context
            "choices": [part[100:115], parts[number + 9][:15], parts[number + 10][:16]],
            "gold": 0,
            "answer": part[100:110],
            "text": "\n\n".join(parts[number : number + 2]),
        }
        for number, part in enumerate(parts[:4])
    ]
    docs[1]["question"] += " "  # the space goes with the choices
    docs[2]["question"] = "\n\n".join(parts[:4])  # longer than LIMIT
    docs[3]["choices"] = ["a", "b", " c"]  # one token each
    (path / "docs.json").write_text(json.dumps(docs))
    data = {
        "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(path / "docs.json")}, "cache_dir": str(path / "cache")
        },
    }  # fmt: skip
    for name, task in TASKS.items():
        (path / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    (path / "group.yaml").write_text(json.dumps({"group": "all", "task": list(TASKS)}))
    return path


@pytest.fixture(scope="module")
def oracle() -> Any:
    return oracle_model(DEMO)


@pytest.fixture(scope="module")
def hf(oracle: Any) -> Any:
    """lm-eval's HF backend on transformers' model. Its module imports accelerate, which this
    project keeps out; nothing of it is used with a model that is there."""
    import transformers.utils

    assert not transformers.utils.is_accelerate_available()  # asked before the stand-in is there
    names = ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size")
    stand_in: Any = types.ModuleType("accelerate")
    stand_in.utils = types.ModuleType("accelerate.utils")
    stand_in.utils.get_max_memory = None
    for name in names:
        setattr(stand_in, name, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "accelerate", stand_in)
        patch.setitem(sys.modules, "accelerate.utils", stand_in.utils)
        module = importlib.import_module("lm_eval.models.huggingface")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return module.HFLM(pretrained=oracle, tokenizer=tokenizer, max_length=LIMIT, device="cpu")


def harness_of(kv: str, limit: int | None = LIMIT) -> Harness:
    return Harness.of(load("demo", device="cpu"), [EXACT_CACHE, *harness_arms(kv)], limit)


@pytest.fixture(scope="module")
def harness() -> Harness:
    return harness_of(",".join(ARMS))


@pytest.fixture(scope="module")
def asked(folder: Path) -> Asked:
    return Asked(tuple(TASKS), include_path=folder)


@pytest.fixture(scope="module")
def tasks(asked: Asked) -> Any:
    return load_tasks(asked, "demo")


@pytest.fixture(scope="module")
def found(harness: Harness, tasks: Any, asked: Asked, tmp_path_factory: Any) -> tuple[Json, Path]:
    out = tmp_path_factory.mktemp("results")
    return evaluate(harness, tasks, asked, command="test", out=out), out


@pytest.fixture(scope="module")
def theirs(hf: Any, tasks: Any) -> Json:
    results = simple_evaluate(hf, tasks=tasks, task_manager=TaskManager(include_defaults=False))
    assert results is not None
    return results


def written(out: Path, pattern: str) -> Path:
    (path,) = out.rglob(pattern)
    return path


def samples(out: Path, task: str) -> list[Json]:
    """Of the exact cache."""
    text = written(out / "exact", f"samples_{task}_*.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_exact_cache_gives_what_the_hf_backend_gives(
    found: tuple[Json, Path], theirs: Json
) -> None:
    results, out = found
    rows = [row for row in results["rows"] if row["metric"] != ANSWER_NLL]
    for row in rows:
        value = theirs["results"][row["task"]][f"{row['metric']},none"]
        assert row["values"]["exact"] == pytest.approx(value, rel=1e-4)
    assert [row["metric"] for row in rows] == [
        "acc", "acc_norm", "word_perplexity", "bits_per_byte", "exact_match",
    ]  # fmt: skip
    for sample, other in zip(samples(out, "choice"), theirs["samples"]["choice"], strict=True):
        pairs = zip(sample["filtered_resps"], other["filtered_resps"], strict=True)
        for (likelihood, greedy), expected in pairs:
            assert float(likelihood) == pytest.approx(expected[0], abs=1e-4)
            assert (greedy == "True") == expected[1]
    texts = [sample["filtered_resps"] for sample in samples(out, "answers")]
    assert texts == [sample["filtered_resps"] for sample in theirs["samples"]["answers"]]
    assert len({text for (text,) in texts}) > 1


def test_all_arms_of_a_task_take_one_sweep(harness: Harness, found: tuple[Json, Path]) -> None:
    """Three arms: contexts are one sweep, texts another, and what answers need is read once."""
    stored = sum(spec.stored_bytes for spec in harness.model.specs)
    results, out = found
    performance = results["performance"]
    assert performance["sweeps"] == 2
    assert performance["walks"] <= 12  # max_gen_toks: prompts and arms walk together
    assert performance["weight_bytes_read"] == 3 * stored
    assert [arm["folder"] for arm in results["arms"]] == ["exact", "lloyd_K3V2", "lloyd_K4V2"]
    for arm, name in zip(ARMS, ("exact", "lloyd_K3V2", "lloyd_K4V2"), strict=True):
        its = json.loads(written(out / name, "results_*.json").read_text("utf-8"))
        assert its["config"]["kv"] == arm
        rows = {row["metric"]: row for row in results["rows"] if row["task"] == "rolling"}
        value = its["results"]["rolling"]["word_perplexity,none"]
        assert rows["word_perplexity"]["values"][arm] == value


def scores(harness: Harness, arm: str, context: list[int], after: list[int]) -> tuple[float, bool]:
    return harness.scores([(context, after)])[0][ARMS.index(arm)]


@pytest.mark.parametrize("arm", ARMS[1:])
def test_a_continuation_reads_its_context_through_the_codec(
    arm: str, harness: Harness, oracle: Any
) -> None:
    """The first prediction, too: it is that of the context's last token, a row of the branch."""
    ids = harness.tokenizer.encode("def main(argv):\n    return run(argv, verbose=True)\n" * 5)
    context, after = ids[:60], ids[60:70]
    through = None if arm == "exact" else codec_of(arm, 6)
    theirs = scored_with_cache(oracle, context[:-1], context[-1:] + after, through)
    likelihood, _ = scores(harness, arm, context, after)
    assert likelihood == pytest.approx(theirs.double().sum().item(), abs=1e-4)
    exact, _ = scores(harness, "exact", context, after)
    assert abs(likelihood - exact) > 1e-3


class CodedCache(DynamicCache):
    """What a cache holds is what is read: every key and value that goes in comes back coded."""

    def __init__(self, model: Any, arm: str) -> None:
        super().__init__(config=model.config)
        self.model, self.through = model, codec_of(arm, 6)
        self.projected: list[Tensor] = []
        for layer in model.model.layers:
            keys = layer.self_attn.k_proj
            keys.register_forward_hook(lambda module, x, out: self.projected.append(out))

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *more: Any, **others: Any
    ) -> tuple[Tensor, Tensor]:
        plain = self.projected[layer].view(1, keys.shape[2], -1, keys.shape[3]).transpose(1, 2)
        coded, values = self.through(plain, values, layer)
        theta = self.model.config.rope_parameters["rope_theta"]
        cos, sin = rope_tables(theta, keys.shape[3], keys.shape[2])
        return coded * cos + rotate_half(coded) * sin, values


@pytest.mark.parametrize("empty", [True, False])
def test_a_text_without_a_context_reads_what_a_growing_cache_holds(
    empty: bool, harness: Harness, oracle: Any
) -> None:
    """Rolling windows, and continuations of an empty context."""
    lm = LayersweepLM(harness, harness.arms[1])
    text = "import os\n\ndef f(x):\n    return os.path.join(x, 'y')\n" * 2
    kind, arguments = ("loglikelihood", ("", text)) if empty else ("loglikelihood_rolling", (text,))
    (answer,) = getattr(lm, kind)([Instance(kind, {}, arguments, 0)])
    ids = [1, *harness.tokenizer.encode(text, add_special_tokens=False)]
    assert 40 < len(ids) <= LIMIT
    with torch.inference_mode():
        cache = CodedCache(oracle, "lloyd:K3V2")
        logits = oracle(torch.tensor([ids[:-1]]), past_key_values=cache).logits[0]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    assert (answer[0] if empty else answer) == pytest.approx(chosen.double().sum().item(), abs=1e-3)


def test_logits_in_pieces_give_the_same_scores(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of branches that are not as long as each other, too."""
    context = harness.tokenizer.encode("import os\nimport sys\nfrom pathlib")
    pairs = [(context, context[:count]) for count in (1, 2, 5)]
    whole = harness.scores(pairs)
    monkeypatch.setattr("layersweep.sweep.loop.positions_at_once", lambda *sizes: 2)
    pieces = Harness.of(harness.model, harness.arms, LIMIT).scores(pairs)
    for mine, other in zip(pieces, whole, strict=True):
        assert [one for one, _ in mine] == pytest.approx([one for one, _ in other], abs=1e-5)


def test_choices_share_their_context_and_one_token_choices_a_branch() -> None:
    context = [5, 6, 7]
    wanted = [Scored.of(context, after, 8) for after in ([1], [2], [3, 4])]
    (ride,) = rides_of(wanted)
    arms = [EXACT_CACHE, *harness_arms("lloyd:K3V2")]
    sequence = ride.sequence(arms)
    assert sequence.prefix == (5, 6)
    assert [(branch.arm.name, branch.ids) for branch in sequence.branches] == [
        ("exact", (7,)), ("lloyd:K3V2", (7,)), ("exact", (7, 3)), ("lloyd:K3V2", (7, 3)),
    ]  # fmt: skip
    assert [sequence.branches[0].role, sequence.branches[1].role] == ["baseline", "arm"]


def test_tiles_hold_at_most_twenty_contexts_and_the_rows_of_a_study() -> None:
    some = rides_of([Scored.of([index] + [1] * 40, [2], 99) for index in range(45)])
    assert [len(tile.sequences) for tile in tiles_of_rides(some, [EXACT_CACHE])] == [20, 20, 5]
    large = rides_of([Scored.of([index] + [1] * 20_000, [2], 30_000) for index in range(5)])
    tiles = tiles_of_rides(large, [EXACT_CACHE])
    assert [(tile.first, len(tile.sequences)) for tile in tiles] == [(0, 2), (2, 2), (4, 1)]


def test_a_bare_arm_keeps_recent_tokens_where_its_cache_grows() -> None:
    (bare, spelled) = harness_arms("K3V2,lloyd:K3V2")
    assert (bare.whole.window, bare.growing.window) == (0, 8)
    assert spelled.whole == spelled.growing
    assert bare.name == "trellis:K3V2@fit=1@found=1"
    with pytest.raises(InputError, match="which are both trellis:K3V2@fit=1@found=1"):
        harness_arms("K3V2,trellis:K3V2@fit=1@found=1")


@pytest.mark.parametrize(("context", "after"), [([], [1]), ([1], []), ([1], [2] * (LIMIT + 1))])
def test_what_cannot_be_scored_is_refused(context: list[int], after: list[int]) -> None:
    with pytest.raises(InputError, match=f"needed a context, and a continuation of 1 to {LIMIT}"):
        Scored.of(context, after, LIMIT)


def test_a_context_that_is_cut_is_announced() -> None:
    said: list[str] = []
    harness = harness_of("")
    harness.say = lambda fallback: said.append(str(fallback))
    harness.scores([([1] * 200, [2]), ([1] * 20, [2])])
    assert said == [
        "lm-eval's contexts: wanted all of them, used their last tokens: "
        "1 of 2 take more than the longest text, 96 tokens"
    ]


def test_lm_eval_knows_the_model_by_name(harness: Harness) -> None:
    """With what lm-eval's own command hands to every model."""
    lm: Any = get_model("layersweep").create_from_arg_string(
        f"pretrained=demo,kv=lloyd:K3V2,max_length={LIMIT}", {"batch_size": 1, "device": "cpu"}
    )
    ids = harness.tokenizer.encode("def main(argv):\n    return 0\n")
    ((own,),) = lm.harness.scores([(ids, [9, 8])])
    assert own[0] == pytest.approx(scores(harness, "lloyd:K3V2", ids, [9, 8])[0], abs=1e-5)
    with pytest.raises(InputError, match="found 2 arms, needed one"):
        get_model("layersweep")(kv="K2-3V2")


def sample(number: int, **values: Any) -> Json:
    return {
        "doc_id": number, "filter": "none", "metrics": list(values), "target": 0,
        "filtered_resps": [(-1.0 - number, True), (-3.0, False)], **values,
    }  # fmt: skip


def test_verdicts_are_compared_by_exact_mcnemar() -> None:
    exact = [sample(number, acc=1.0) for number in range(12)]
    arm = [sample(number, acc=float(number >= 6)) for number in range(12)]
    (one,) = differences({"exact": exact, "lloyd:K3V2": arm}, "acc", "none")
    assert (one.kind, one.n, one.lost, one.gained, one.delta) == ("verdicts", 12, 6, 0, -0.5)
    assert one.p == one.p_holm == 2 * 0.5**6
    two = differences({"exact": exact, "a": arm, "b": arm}, "acc", "none")
    assert [each.p_holm for each in two] == [4 * 0.5**6] * 2


def test_losses_are_compared_per_word_of_all_documents() -> None:
    found = {
        arm: [
            sample(n, word_perplexity=(-10.0 - n * worse, 5), bits_per_byte=(-10.0 - n * worse, 20))
            for n in range(3)
        ]
        for worse, arm in enumerate(("exact", "a"))
    }
    (words,) = differences(found, "word_perplexity", "none")
    assert (words.kind, words.lost) == ("losses", None)
    assert words.delta == pytest.approx(3.0 / 15)
    (bits,) = differences(found, "bits_per_byte", "none")
    assert bits.delta == pytest.approx(3.0 / 60 / 0.6931472)
    (answers,) = differences(found, ANSWER_NLL, "none")
    assert (answers.kind, answers.delta, answers.p) == ("losses", 0.0, 1.0)
    for value in ((0, 1), float("nan"), "text"):  # more, or less, than a number
        its = [sample(n, own=value) for n in range(3)]
        assert differences({"exact": its, "a": its}, "own", "none") == []


@pytest.fixture
def quick_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own tasks, which take seconds to list."""
    only = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(evaluation, "TaskManager", only)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["lm-eval", "demo", "--device", "cpu", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()[-2:]
    assert hint.startswith("hint: ")
    return error


@pytest.mark.usefixtures("quick_tasks")
def test_what_cannot_work_is_refused_before_weights_are_read(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("layersweep.sweep.model.Model.open")
    local, two = ("--include-path", str(folder)), ("--device", "cpu,cpu")
    say = functools.partial(refused, capsys)
    assert "found 'chioce', needed a task" in say("--tasks", "chioce", *local)
    assert "found a task twice (Duplicate task 'choice'" in say("--tasks", "choice,all", *local)
    assert "found no name" in say("--tasks", ",", *local)
    assert "found no folder" in say("--tasks", "choice", "--include-path", str(tmp_path / "none"))
    assert "unknown name 'k99'" in say("--tasks", "choice", "--kv", "K99", *local)
    assert "needed 2 to 8192" in say("--tasks", "choice", "--max-length", "9999", *local)
    assert "found 2 devices, needed one" in say("--tasks", "choice", *two, *local)
    assert "found no chat template" in say("--tasks", "choice", "--apply-chat-template", *local)
    assert "needed more than 0" in say("--tasks", "choice", "--limit", "0", *local)
    (tmp_path / "lm_eval.json").write_text("{}")
    assert "results of another run" in say("--tasks", "choice", "--out", str(tmp_path), *local)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "found no package lm_eval" in say("--tasks", "choice")


@pytest.mark.usefixtures("quick_tasks")
def test_a_task_whose_data_is_missing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {
        "task": "lost", "dataset_path": "json", "test_split": "test", **TASKS["choice"],
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.json")}},
    }  # fmt: skip
    (tmp_path / "lost.yaml").write_text(json.dumps(task))
    error = refused(capsys, "--tasks", "lost", "--include-path", str(tmp_path))
    assert "found a task lost that cannot be loaded (FileNotFoundError: " in error


@pytest.mark.usefixtures("quick_tasks")
def test_the_command_prints_a_table_and_nothing_else_on_stdout(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loud(*given: Any, **named: Any) -> Any:
        print("bootstrapping")
        return simple_evaluate(*given, **named)

    monkeypatch.setattr(evaluation, "simple_evaluate", loud)
    words = ["--tasks", "choice", "--kv", "lloyd:K3V2", "--include-path", str(folder)]
    assert run(["lm-eval", "demo", "--device", "cpu", "--limit", "2", *words]) == 0
    out, err = capsys.readouterr()
    assert err.count("bootstrapping") == 1  # of two arms
    lines = out.splitlines()
    assert lines[0] == "demo: nf4 weights, float32"
    assert lines[-1] == "2 arms in 1 sweep(s): 11.73 MiB of weights read"
    assert [line.split()[0] for line in lines[3:9:2]] == ["choice"] * 3


def test_sampled_contexts_have_a_seed_for_each_time_they_are_asked_for() -> None:
    greedy = Context((1, 2), sampling_of({"until": ["x", ""], "max_gen_toks": 3}, "</s>"))
    assert greedy.sampling == Sampling(max_new_tokens=3, stop=("x", "</s>"))
    sampled = Context(
        (1,), sampling_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, None)
    )
    assert (sampled.sampling.max_new_tokens, sampled.sampling.temperature) == (256, 0.7)
    found = numbered([greedy, sampled, greedy, sampled])
    assert [one.sampling.seed for one in found] == [None, 0, None, 1]


def test_a_context_is_cut_to_what_its_answer_leaves() -> None:
    context = Context((1, 2, 3, 4, 5), Sampling(max_new_tokens=7))
    assert context.fitted(10).ids == (3, 4, 5)
    with pytest.raises(InputError, match="found max_gen_toks 7, needed fewer than the 7 tokens"):
        context.fitted(7)


def test_unknown_generation_kwargs_are_named() -> None:
    assert sampling_of({"num_beams": 1, "temperature": 0.0}, None).do_sample is False
    with pytest.raises(InputError, match="found max_length, num_beams in a task's"):
        sampling_of({"num_beams": 4, "max_length": 100}, None)


def test_answers_that_cannot_be_generated_are_refused_before_weights_are_read(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="found max_gen_toks 96, needed fewer"):
        harness.check_answers("long", sampling_of({"max_gen_toks": LIMIT}, None))
    with pytest.raises(InputError, match=r"temperature: found 0\.0"):
        harness.check_answers("cold", sampling_of({"do_sample": True, "temperature": 0.0}, None))
    decoder = replace(harness.model.decoder, generic=object())  # type: ignore[arg-type]
    checkpoint = replace(harness.model.checkpoint, decoder=decoder)
    other = replace(harness, model=replace(harness.model, checkpoint=checkpoint))
    with pytest.raises(InputError, match="answers token by token") as refusal:
        other.check_answers("answers", Sampling())
    assert refusal.value.hint == "leave answers out of --tasks"


def test_an_arm_that_is_not_finite_has_no_results(
    harness: Harness, tasks: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the arms alone: a baseline that is not finite ends the run."""
    kept = Harness.of(harness.model, harness.arms, LIMIT)
    record = SweepRecord(nonfinite={(0, 0, 1): 4, (0, 2, 4): 3})
    ill = _ill(torch.zeros(2, 3, 2), record, 3)
    assert ill == {1: "non-finite numbers from layer 3 on"}
    assert _ill(torch.tensor([[[0.0, 0.0], [1.0, torch.nan]]]), SweepRecord(), 2) == {
        1: "non-finite logits"
    }
    honest = scoring.score

    def broken(*given: Any) -> Scores:
        return replace(honest(*given), ill=ill)

    monkeypatch.setattr("layersweep.integrations.lm_eval.harness.score", broken)
    (choice, *_) = tasks
    results = evaluate(kept, [choice], asked, command="test")
    assert [arm["status"] for arm in results["arms"]] == ["ok", "nonfinite", "ok"]
    assert list(results["rows"][0]["values"]) == ["exact", "lloyd:K4V2"]
    with pytest.raises(GateError, match="lloyd:K3V2 gives non-finite numbers from layer 3 on"):
        LayersweepLM(kept, kept.arms[1])._check()
    ill[0] = ill.pop(1)
    with pytest.raises(GateError, match="the exact cache gives non-finite"):
        kept.scores([([1, 2], [3])])


def test_a_group_is_compared_over_the_documents_of_its_tasks() -> None:
    """With the mean that lm-eval gives it."""

    def results(*right: float) -> Json:
        tasks = {
            name: [
                sample(number, acc=acc) | {"prompt_hash": name, "target": "x"}
                for number, acc in enumerate(accs)
            ]
            for name, accs in (("a", right[:2]), ("b", right[2:]))
        }
        values = {name: {"acc,none": sum(s["acc"] for s in its) / 2} for name, its in tasks.items()}
        return {
            "samples": tasks, "results": values, "higher_is_better": {},
            "groups": {"both": {"acc,none": sum(right) / 4}},
            "group_subtasks": {"both": ["inner", "b"], "inner": ["a"], "a": [], "b": []},
        }  # fmt: skip

    rows = rows_of({"exact": results(1.0, 1.0, 1.0, 0.0), "e8:K3V2": results(0.0, 1.0, 0.0, 1.0)})
    assert [(row["task"], row["n"]) for row in rows] == [("a", 2), ("b", 2), ("both", 4)]
    (pooled,) = rows[2]["differences"]
    assert (pooled["lost"], pooled["gained"], pooled["delta"]) == (2, 1, -0.25)
    assert rows[2]["values"] == {"exact": 0.75, "e8:K3V2": 0.5}


def test_a_template_that_refuses_system_messages_gets_the_rest(harness: Harness) -> None:
    said: list[str] = []
    lm = LayersweepLM(replace(harness, say=lambda one: said.append(one.why)), EXACT_CACHE)
    lm.tokenizer = AutoTokenizer.from_pretrained(DEMO)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.content }}]{% endfor %}"
    )
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert [lm.apply_chat_template(chat), lm.apply_chat_template(chat)] == ["[hi]"] * 2
    assert said == ["no system"]
    lm.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InputError, match=r"template refuses \(never\)"):
        lm.apply_chat_template(chat[1:])


def test_a_tokenizer_that_transformers_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no tokenizer that transformers reads"):
        _tokenizer(tmp_path)
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="found a tokenizer without an end token"):
        _tokenizer(tmp_path)


def test_the_documented_task_asks_for_what_follows() -> None:
    tool = runpy.run_path(str(TOOLS / "make_lm_eval_task.py"))
    text = tool["TEXT"].read_text("utf-8")
    found = tool["documents"](text)
    assert len(found) == 74
    words = " ".join(text.split())
    for one in found:
        assert f"{one['context']} {one['choices'][one['gold']]}" in words
        assert len(set(one["choices"])) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives(harness: Harness) -> None:
    """Branches of one context that are not as long as each other, and a text without one."""
    ids = harness.tokenizer.encode("def main(argv):\n    return run(argv, verbose=True)\n" * 5)
    pairs = [(ids[:60], ids[60 : 60 + count]) for count in (1, 2, 10)] + [(ids[:1], ids[1:40])]
    model = load("demo", device="cuda", dtype="float32")
    on_gpu = Harness.of(model, harness.arms, LIMIT).scores(pairs)
    for ours, expected in zip(on_gpu, harness.scores(pairs), strict=True):
        assert [one for one, _ in ours] == pytest.approx([one for one, _ in expected], abs=5e-2)
