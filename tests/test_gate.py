"""The gate passes a working model and refuses planted faults."""

from __future__ import annotations

import math
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layersweep.errors import GateError
from layersweep.families.spec import Feed, Router
from layersweep.study.gate import COPY, Gate
from layersweep.study.gate_tokens import PARAGRAPH, GateTokens, choose_tokens, is_varied
from layersweep.study.run import run_study
from layersweep.study.study import prepare_study
from layersweep.sweep.model import load
from layersweep.sweep.record import LayerHealth
from layersweep.tasks.settings import EvalSettings
from layersweep.text.tokenizer import TextTokenizer

planting = runpy.run_path(str(Path(__file__).parents[1] / "tools/plant_faults.py"))
DEMO, copy_demo, tensor = planting["DEMO"], planting["copy_demo"], planting["tensor"]
ONLY_GATE = EvalSettings(gate="only")


def text_file(folder: Path) -> str:
    text = (DEMO / "text/heldout.txt").read_text()[:20_000]
    path = folder / "text.txt"
    path.write_text(text)
    return str(path)


def run_gate(folder: Path, tmp_path: Path) -> None:
    settings = EvalSettings(gate="only", text=text_file(tmp_path))
    run_study(prepare_study(load(str(folder), device="cpu"), settings))


def test_the_bundled_model_passes_every_check() -> None:
    study = prepare_study(load("demo", device="cpu"), ONLY_GATE)
    outcome = run_study(study)
    report = study.gate.report()
    assert report["passed"] is True
    assert (outcome.sweeps, outcome.gate_sweeps) == (0, 1)
    assert len(report["experts_used_per_layer"]) == 6
    assert 4 <= min(report["experts_used_per_layer"]) <= max(report["experts_used_per_layer"]) == 8
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["first copy"]["value"] < checks["first copy"]["limit"]
    assert checks["copy gain"]["value"] > 0.5
    assert checks["model card"]["value"] < 0.02
    assert checks["peak within plan"]["passed"]


CARD = r"^gate: NLL [0-9.]+ of the text is [0-9.]+ away from the model card's 3\.1936$"
REPEATED = r"^gate: NLL [0-9.]+ of the repeated text is [0-9.]+ away from the model card's 1\.6566$"
NAN = (
    r"^model-00003-of-00003\.safetensors: model\.layers\.4\.block_sparse_moe\.experts\.3\.w2"
    r"\.weight\.nested_absmax\[0\]: found nan, needed finite scales"
)
CAUGHT = {
    "a NaN scale in layer 4": (2, NAN),
    "router of layer 0 zero": (3, "^gate: layer 0: 2 distinct experts"),
    "router of layer 5 zero": (3, "^gate: layer 5: 2 distinct experts"),
    "w1 and w3 swapped in layer 0": (3, CARD),
    "w1 and w3 swapped in layer 3": (3, REPEATED),
    "w1 and w3 swapped in all layers": (3, CARD),
    "rope_theta 10000": (3, r"^gate: a repeated text is only 0\.129 nats easier, needed 0\.5$"),
    "rope_theta 1e+07": (3, CARD),
    "attention norm of layer 0 ones": (3, CARD),
    "attention norm of layer 2 zeros": (3, "^gate: a repeated text is only -0.018 nats easier"),
    "expert norm of layer 3 zeros": (3, "^gate: layer 3: 2 distinct experts"),
    "expert norm of layer 3 times 3": (3, CARD),
    "last norm ones": (3, r"^gate: logits times 2 predict the text 0\.137 nats better"),
    "last norm a layer's": (3, r"^gate: logits times 2 predict the text 1\.201 nats better"),
    "last norm times 3": (3, r"^gate: logits times 0\.5 predict the text 2\.929 nats better"),
    "last norm zeros": (3, r"^gate: the text's NLL is 8\.318 nats, needed below 7\.318"),
}


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_planted_fault_is_refused_by_the_command(fault: str, tmp_path: Path) -> None:
    """A card is there only for the faults that nothing else catches."""
    code, message = CAUGHT[fault]
    folder = copy_demo(tmp_path / "model", card=message in (CARD, REPEATED))
    planting["FAULTS"][fault](folder)
    found, said = planting["gate"](folder)
    assert found == code, said
    assert re.search(message, said)


@pytest.mark.parametrize("card", [True, False])
def test_an_undamaged_copy_passes_the_command(card: bool, tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "model", card=card)
    planting["rewrite"](folder)
    assert planting["gate"](folder) == (0, "")


TEXTS = {
    "sentences": "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again.\n",
    "a line": "    return self.app\n",
    "dashes": "-" * 79 + "\n",
    "emoji": "\N{GRINNING FACE}" * 20,
    "one letter": "a",
    "a few words": "def f(x):\n    return x",
}


@pytest.fixture(scope="module")
def demo_tokenizer() -> TextTokenizer:
    return TextTokenizer.load(load("demo", device="cpu").checkpoint.folder)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_repeats_itself_gives_way_to_a_paragraph(
    name: str, demo_tokenizer: TextTokenizer
) -> None:
    text = TEXTS[name] * (1 if name == "a few words" else 2000)
    tokens = choose_tokens(text, demo_tokenizer, None, COPY)
    assert [fallback.used for fallback in tokens.fallbacks] == ["a paragraph of its own"]
    assert tokens.ids == demo_tokenizer.encode(PARAGRAPH)[:256]
    assert (len(tokens.ids), is_varied(tokens.ids)) == (256, True)


def test_the_paragraph_judges_the_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXTS["a line"] * 2000)
    settings = EvalSettings(gate="only", text=str(text))
    study = prepare_study(load("demo", device="cpu"), settings)
    assert ("gate", "a paragraph of its own") in [(one.what, one.used) for one in study.fallbacks]
    run_study(study)
    folder = copy_demo(tmp_path / "model", card=False)
    planting["FAULTS"]["rope_theta 100"](folder)
    with pytest.raises(GateError, match=r"only 0\.13\d nats easier, needed 0\.5"):
        run_study(prepare_study(load(str(folder), device="cpu"), settings))


def test_the_gate_takes_the_first_varied_stretch_of_a_text(demo_tokenizer: TextTokenizer) -> None:
    text = (DEMO / "text/heldout.txt").read_text("utf-8")[:4000]
    assert choose_tokens(text, demo_tokenizer, None, COPY) == GateTokens(
        demo_tokenizer.encode(text)[:256]
    )
    with_bos = choose_tokens(text, demo_tokenizer, 1, COPY)
    assert with_bos == GateTokens([1, *demo_tokenizer.encode(text)[:255]])
    later = choose_tokens(TEXTS["a line"] * 100 + text, demo_tokenizer, None, COPY)
    assert [fallback.used for fallback in later.fallbacks] == ["tokens 512 to 767"]
    assert len(later.ids) == 256 and is_varied(later.ids)


def test_a_dense_layer_has_no_routing_to_check() -> None:
    decoder = load("demo", device="cpu").decoder
    layer = replace(decoder.layers[0], feed=Feed(96))
    gate = Gate(replace(decoder, layers=(layer,)), GateTokens(list(range(256))), None)
    gate.check_layer(LayerHealth(0, 1.0, experts_used=None, router_spread=None))
    assert [check.name for check in gate.checks] == ["finite"]


@pytest.mark.parametrize(("used", "of"), [(8, 8), (1, 1)])
def test_a_mixture_that_uses_every_expert_has_nothing_to_choose(used: int, of: int) -> None:
    decoder = load("demo", device="cpu").decoder
    layer = decoder.layers[0]
    feed = replace(layer.feed, experts=of, router=Router(used))
    decoder = replace(decoder, layers=(replace(layer, feed=feed),))
    gate = Gate(decoder, GateTokens(list(range(256))), None)
    gate.check_layer(LayerHealth(0, 1.0, experts_used=of, router_spread=0.0))
    assert [check.name for check in gate.checks] == ["finite"]


def test_a_model_with_a_short_limit_has_a_short_gate() -> None:
    model = load("demo", device="cpu")
    decoder = replace(model.decoder, max_position_embeddings=100)
    model = replace(model, checkpoint=replace(model.checkpoint, decoder=decoder))
    study = prepare_study(model, ONLY_GATE)
    assert len(study.gate.ids) == 100
    run_study(study)


def knowing(first: float, second: float) -> torch.Tensor:
    """Logits of a model whose NLL is `first` on the first copy and `second` on the second."""
    ids = torch.arange(512) % 256
    logits = torch.zeros(511, 4096)
    for rows, nll in ((slice(0, 256), first), (slice(256, 511), second)):
        odds = math.exp(-nll) / (1 - math.exp(-nll))
        logits[rows, ids[1:][rows]] = 0.0
        logits[torch.arange(511)[rows], ids[1:][rows]] = math.log(odds * 4095)
    return logits


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (0.355, 0.074, None),  # a text known by heart: measured on a real model
        (0.3, 0.3, None),
        (0.8, 0.45, None),
        (0.8, 0.55, "only 0.250 nats easier, needed 0.3"),
        (3.0, 2.6, "only 0.400 nats easier, needed 0.5"),
    ],
)
def test_the_gain_of_a_copy_is_judged_by_what_is_left_to_gain(
    first: float, second: float, refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layersweep.study.gate.SCALE_GAINS", {})  # these models are not sure enough
    gate = Gate(load("demo", device="cpu").decoder, GateTokens(list(range(256))), None)
    if refused is None:
        gate.check_logits([(slice(None), [knowing(first, second)])])
        assert all(check.passed for check in gate.checks)
        return
    with pytest.raises(GateError, match=refused):
        gate.check_logits([(slice(None), [knowing(first, second)])])


def guessing(right: float, sure: float) -> torch.Tensor:
    """Logits of a model that gives probability `sure` to one token, the right one in a share
    `right` of the first copy and always in the second."""
    vocabulary = 4096
    ids = torch.arange(512) % 256
    logits = torch.zeros(511, vocabulary)
    guess = ids[1:].clone()
    guess[: round(255 * (1 - right))] += 1000
    guess[256:] = ids[257:]
    logits[torch.arange(511), guess] = math.log(sure / (1 - sure) * (vocabulary - 1))
    logits[256:] *= 2.0
    return logits


@pytest.mark.parametrize(
    ("right", "sure", "refused"),
    [
        (0.5, 0.5, None),
        (0.8, 0.8, None),
        # -ln 0.5; doubled, the odds against the other 4095 are squared: 4095 to 1, loss 0.0002
        (1.0, 0.5, "logits times 2 predict the text 0.693 nats better"),
        # 51 of 255 wrong at a logit of ln(9999 x 4095) = 17.528: 0.2 x 17.528 = 3.506; halved,
        # ln(1 + 4095 exp(-8.764)) = 0.495 where right: 0.2 x 8.764 + 0.495 = 2.248
        (0.8, 0.9999, "logits times 0.5 predict the text 1.258 nats better"),
    ],
)
def test_logits_of_the_wrong_scale_are_refused(
    right: float, sure: float, refused: str | None
) -> None:
    gate = Gate(load("demo", device="cpu").checkpoint.decoder, GateTokens(list(range(256))), None)
    if refused is None:
        gate.check_logits([(slice(None), [guessing(right, sure)])])
        assert all(check.passed for check in gate.checks)
        return
    with pytest.raises(GateError, match=refused):
        gate.check_logits([(slice(None), [guessing(right, sure)])])


def test_a_non_finite_layer_is_refused_with_its_number(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "model")
    tensor("3.post_attention_layernorm.weight", lambda old: torch.full_like(old, 1e38))(folder)
    with pytest.raises(GateError, match="layer 3: hidden states are not finite"):
        run_gate(folder, tmp_path)


def test_a_baseline_whose_logits_overflow_is_refused(tmp_path: Path) -> None:
    folder = copy_demo(tmp_path / "model")
    tensor("lm_head.weight", lambda old: torch.full_like(old, 3e38))(folder)
    settings = EvalSettings(
        tasks=("ppl",), text=text_file(tmp_path), segments=1, prefix=64, continuation=16, gate="off"
    )
    study = prepare_study(load(str(folder), device="cpu"), settings)
    with pytest.raises(GateError, match="perplexity 0: the exact baseline's loss is nan"):
        run_study(study)


NO_CARDS = {
    "not JSON": "not json",
    "a list": "[]",
    "empty": '{"gate": {}}',
    "deep": "[" * 100_000,
    "infinite": '{"gate": {"nll": 1e999}}',
    "of a wrong type": '{"gate": {"tokens_sha": "", "nll": [], "nll_repeated": 1}}',
    "too large": '{"gate": {"tokens_sha": "", "nll": 1' + "0" * 400 + ', "nll_repeated": 1}}',
}


@pytest.mark.parametrize("card", NO_CARDS.values(), ids=NO_CARDS)
def test_somebody_elses_card_promises_nothing(tmp_path: Path, card: str) -> None:
    folder = copy_demo(tmp_path / "model")
    (folder / "card.json").write_text(card)
    settings = EvalSettings(gate="only", text=text_file(tmp_path))
    study = prepare_study(load(str(folder), device="cpu"), settings)
    assert study.gate is not None and study.gate.card is None
