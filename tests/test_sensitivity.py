"""What each stream of each layer costs alone: attention against its formula, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_study
import torch
from small_shapes import small_shape
from torch import Tensor

from layersweep.bench.sensitivity import (
    BOTH,
    KEYS,
    VALUES,
    AttentionErrors,
    Part,
    Sample,
    measure_parts,
    parts_of,
)
from layersweep.checkpoint.synth import write_synthetic
from layersweep.cli.app import run
from layersweep.errors import InputError
from layersweep.kv import parse
from layersweep.kv.arms import EXACT
from layersweep.sweep.model import Model, load
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile
from layersweep.sweep.watch import Attended

WINDOWS = ("--segments", "2", "--prefix", "48", "--continuation", "9")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load(str(tiny_study.model_folder()), device="cpu")


def softmax_of(seen: Attended, branch: int, token: int, head: int, keys: Tensor) -> Tensor:
    """Of one query at one head, by the formula, with the sink's share last where there is one."""
    q = seen.q[0, head, seen.branch(branch)][token].double()
    at = len(seen.group.sequences[0].prefix) - seen.first + token  # its own key
    rule = seen.context.rule
    low = 0 if rule.window is None else max(0, at + 1 - rule.window)
    scores = torch.full((keys.shape[0],), -torch.inf, dtype=torch.float64)
    scores[low : at + 1] = keys[low : at + 1].double() @ q * (rule.scale or len(q) ** -0.5)
    if seen.context.sinks is not None:
        scores = torch.cat((scores, seen.context.sinks[head].double()[None]))
    return scores.softmax(0)


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ("llama-3.1-8b", {}),
        ("gpt-oss-20b", {"layer_types": ["sliding_attention", "full_attention"]}),  # has sinks
    ],
)
def test_attention_as_the_formula_has_it(
    shape: str, fields: dict[str, list[str]], tmp_path: Path
) -> None:
    write_synthetic(
        tmp_path / "model", small_shape(shape).with_fields({"num_hidden_layers": 2, **fields})
    )
    model = load(str(tmp_path / "model"), device="cpu")
    parts = parts_of(parse("lloyd:K2V2"), model.decoder)
    ids = tuple(torch.randint(4096, (57,), generator=torch.Generator().manual_seed(0)).tolist())
    branches = tuple(Branch(arm, ids[48:], (0, 8)) for arm in (EXACT, *parts.values()))
    errors, compared = AttentionErrors.of([parts]), []

    def watch(seen: Attended) -> None:
        errors(seen)
        from layersweep.sweep.heads import read

        index = 1 + list(parts).index(Part(KEYS, seen.layer))
        exact, _ = read([seen.past, seen.own], seen.first, seen.table, seen.context)
        coded, values = read([seen.store.decoded(index), seen.own], seen.first, seen.table,
                             seen.context)  # fmt: skip
        found, repeats = seen.divergence(index), seen.q.shape[1] // exact.shape[1]
        for token, head in ((0, 0), (3, 1), (8, 3)):
            p, p_coded = (
                softmax_of(seen, 0, token, head, keys[0, head // repeats])
                for keys in (exact, coded)
            )
            kl = (p * (p / p_coded).log()).nansum()
            assert found[0, head, token] == pytest.approx(kl.item(), rel=1e-3, abs=1e-7)
            out = p_coded[: values.shape[2]] @ values[0, head // repeats].double()
            row = seen.out[0, head, seen.branch(index)][token].double()
            assert (row - out).abs().max() < 1e-5
            compared.append(kl.item())

    model.run([Tile("t", (BranchedSequence(ids[:48], branches),))], lambda *what: None, watch=watch)
    assert len(compared) == 6 and max(compared) > 1e-4
    for part, arm in parts.items():
        figures = errors.figures(arm.name)
        assert (figures["output_error"] is not None) == (part.layer is not None)
        assert (figures["attention_kl"] is not None) == (
            part.layer is not None and part.stream == KEYS
        )


def test_parts_of_an_arm_alone_and_together(tiny: Model) -> None:
    arm = parse("lloyd:K3V2@sink=2")
    parts = parts_of(arm, tiny.decoder)
    assert list(parts) == [
        Part(BOTH), Part(KEYS), Part(KEYS, 0), Part(KEYS, 1), Part(VALUES), Part(VALUES, 0),
        Part(VALUES, 1),
    ]  # fmt: skip
    for part, coding in parts.items():
        again = parse(coding.name)
        assert (coding.key_bits, coding.value_bits, coding.layers) == (
            again.key_bits, again.value_bits, again.layers
        ), part  # fmt: skip
    assert list(parts_of(parse("lloyd:K3V16"), tiny.decoder)) == list(parts)[:4]
    found = measure_parts(tiny, [arm], Sample(str(tiny_study.text_file()), 2, 48, 9))
    row = found.row(arm.name)
    everything, alone = row["everything"]["kl"], [row["keys"]["kl"], row["values"]["kl"]]
    each = [layer[stream]["kl"] for layer in row["layers"] for stream in (KEYS, VALUES)]
    assert len(each) == 4 and all(0 < kl < everything for kl in each)
    assert sum(each) == pytest.approx(everything, rel=0.2)
    assert sum(alone) == pytest.approx(everything, rel=0.2)
    assert found.nats(arm.name, Part(VALUES, 1)) == pytest.approx(row["layers"][1]["values"]["kl"])


@pytest.mark.parametrize("kv", ["int4", "identity", "K3V2@pb=1", "K3V2@layers=0"])
def test_arms_whose_parts_cannot_be_told_apart_are_refused(kv: str, tiny: Model) -> None:
    with pytest.raises(InputError, match=f"--kv: found {kv}, needed an arm with bits K..V.."):
        parts_of(parse(kv), tiny.decoder)


def test_coordinates_of_the_reference_text_are_measured(tiny: Model) -> None:
    arms = [parse(f"trellis:K2V2@fit={fit}") for fit in "01"]
    found = measure_parts(tiny, arms, Sample(str(tiny_study.text_file()), 1, 48, 9))
    kept, fitted = (found.row(arm.name)["everything"]["kl"] for arm in arms)
    assert kept != fitted and min(kept, fitted) > 0


def test_the_bench_prints_a_table_and_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "codec", "--kv", "lloyd:K3V2", "--text", str(tiny_study.text_file())]
    assert run([*words, "--model", str(tiny_study.model_folder()), *WINDOWS]) == 0
    out, err = capsys.readouterr()
    line = json.loads(out)
    (row,) = line["rows"]
    assert (row["job"], len(row["layers"]), line["segments"]) == ("lloyd:K3V2", 2, 2)
    assert row["bits_per_element"] == 2.5 + 16 / 16
    rows = [words for text in err.splitlines() if (words := text.split()) and words[0] in "01"]
    assert [len(cells) for cells in rows] == [8, 8]
    assert float(rows[0][3]) == pytest.approx(
        1000 * row["layers"][0]["keys"]["attention_kl"], abs=1e-3
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--segments", "2"], "--segments: found no --model, needed one with it"),
        (["--model", "demo", "--dim", "64"], "--dim: found --model, needed none with it"),
    ],
)
def test_options_of_the_other_bench_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "codec", *words]) == 2
    assert f"error: {message}\n" in capsys.readouterr().err


def test_calibrate_writes_what_an_arm_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, model = tmp_path / "tiny.json", str(tiny_study.model_folder())
    words = ["calibrate", model, "--text", str(tiny_study.text_file()), "--out", str(file)]
    assert run([*words, *WINDOWS]) == 0
    assert run(["calibrate", model, "--out", str(tmp_path / "no/such.json")]) == 2
    arm = parse(f"K3V2@calibration={file}")
    arm.check_model(2, load(model, device="cpu").checkpoint.fingerprint)
    assert arm.layer_bits is not None and sum(map(sum, arm.layer_bits)) == 2 * (3 + 2)
    costs = [cost for layer in arm.calibration.layers for cost in layer.both]  # type: ignore[union-attr]
    assert all(cost.elements == 32 and cost.nats[0] > cost.nats[3] for cost in costs)  # type: ignore[union-attr]
    each = " ".join(f"{keys}{values}" for keys, values in arm.layer_bits)
    assert f"K3V2: {each}\n" in capsys.readouterr().out
