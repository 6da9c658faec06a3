"""`layersweep generate`: prompts from a file, answers to a file, and what a kill leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layersweep.cli.app import run
from layersweep.generate.prompts import read_prompts
from layersweep.generate.request import Sampling
from layersweep.text.tokenizer import TextTokenizer

DEMO = Path(__file__).parents[1] / "src/layersweep/demo/model"
LINES = [
    {"prompt": "The task queue"},
    {"ids": [5, 6, 7], "id": "mine", "max_new_tokens": 3},
    {"prompt": "import", "seed": 7, "do_sample": True, "stop": "zzz", "logprobs": 2},
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.load(DEMO)


def written(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def generate(prompts: Path, out: Path, *more: str) -> int:
    return run(
        ["generate", "demo", "--prompts", str(prompts), "--out", str(out), "--device", "cpu",
         "--max-new-tokens", "6", "--ignore-eos", "--max-length", "256", *more]
    )  # fmt: skip


def answers(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {(one["id"], one["kv"]): one for one in found}


def test_every_prompt_is_answered_under_every_arm(tmp_path: Path) -> None:
    prompts, out = written(tmp_path, *LINES), tmp_path / "answers.jsonl"
    assert generate(prompts, out, "--kv", "exact,lloyd:K3V2") == 0
    found = answers(out)
    names = ("1", "mine", "3")
    assert sorted(found) == sorted((n, kv) for n in names for kv in ("exact", "lloyd:K3V2"))
    assert [len(found[name, "exact"]["ids"]) for name in names] == [6, 3, 6]
    assert found["mine", "exact"]["prompt_tokens"] == 3
    assert {one["finish"] for one in found.values()} == {"length"}
    assert all(len(top) == 2 for top in found["3", "exact"]["top_logprobs"])
    assert "logprobs" not in found["1", "exact"]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    prompts, out = written(tmp_path, *LINES), tmp_path / "answers.jsonl"
    assert generate(prompts, out) == 0
    whole = answers(out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:20])  # as a kill leaves it
    assert generate(prompts, out) == 2  # it is there
    assert generate(prompts, out, "--resume") == 0
    assert out.read_text().startswith(lines[0])
    assert answers(out) == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: found no JSON"),
        ("[1]", "line 2: found JSON that is no object"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: found prompt twice"),
        ({}, "line 2: found none, needed one of prompt, messages, ids"),
        ({"prompt": "a", "ids": [1]}, "line 2: found prompt and ids"),
        ({"prompt": "a", "temprature": 1}, "line 2: found the field 'temprature'"),
        ({"prompt": "a", "top_k": 1.5}, "line 2: found top_k 1.5, needed int"),
        ({"prompt": "a", "stop": [1]}, "line 2: found stop"),
        ({"prompt": 1}, "line 2: found prompt 1, needed text"),
        ({"ids": ["a"]}, "line 2: found ids of something else"),
        ({"messages": [{"role": "user"}]}, "line 2: found messages of something else"),
        ({"prompt": "a", "id": "1"}, "line 2: found id '1' again"),
        ({"prompt": "a", "id": [1]}, "line 2: found id [1]"),
        ({"ids": [99999]}, "line 2: prompt: found token id 99999"),
        ({"prompt": "a", "max_new_tokens": 0}, "line 2: max_new_tokens: found 0"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(
    line: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    assert generate(written(tmp_path, {"prompt": "good"}, line), out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() or not out.read_text()


def test_seeds_count_on_from_line_to_line(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = written(tmp_path, {"prompt": "a"}, "", {"prompt": "b"}, {"prompt": "c", "seed": 40})
    prompts = read_prompts(path, tokenizer, Sampling(seed=5))
    assert [(p.id, p.sampling.seed) for p in prompts] == [("1", 5), ("3", 6), ("4", 40)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found none, needed one of them"),
        (["--prompt", "a", "--prompts", "b"], "found both, needed one"),
        (["--prompt", "a", "--resume"], "--resume: found no --out"),
        (["--prompts", "b", "--chat"], "--chat: found --prompts"),
        (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl: found no readable file"),
        (["--prompt", "a", "--chat"], "found no chat template"),
        (["--prompt", "a", "--bos", "perhaps"], "--bos: found 'perhaps'"),
        (["--prompt", "a", "--chat", "--bos", "always"], "--bos always: found --chat"),
        (["--prompt", "a", "--max-length", "99999"], "found texts of 99999 tokens"),
    ],
)
def test_what_is_asked_is_checked(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "demo", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_one_prompt_streams_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "demo", "--prompt", "The task", "--device", "cpu", "--ignore-eos",
             "--max-new-tokens", "5", "--max-length", "128"]  # fmt: skip
    assert run(words) == 0
    told = capsys.readouterr()
    assert told.out.strip()
    assert "[paths] device cpu, float32" in told.err
    assert ", 5 made, " in told.err


def test_one_prompt_with_log_probabilities_is_a_json_object(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["generate", "demo", "--prompt", "The task", "--kv", " lloyd:K3V2, exact", "--device",
             "cpu", "--ignore-eos", "--max-new-tokens", "2", "--logprobs", "1"]  # fmt: skip
    assert run(words) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(one["kv"] for one in found) == ["exact", "lloyd:K3V2"]
    assert [len(one["top_logprobs"]) for one in found] == [2, 2]
