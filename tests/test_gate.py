"""The gate passes a working model and refuses planted faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from layersweep.errors import CheckpointError, GateError
from layersweep.evals.settings import EvalSettings
from layersweep.evals.run import run_study
from layersweep.evals.study import prepare_study
from layersweep.sweep.model import load

DEMO = Path(__file__).parents[1] / "src/layersweep/demo/model"
ONLY_GATE = EvalSettings(gate="only")


def broken_demo(folder: Path) -> Path:
    """A copy of the bundled model, to be damaged."""
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    return folder


def edit_tensors(folder: Path, part: str, change: object) -> None:
    """Rewrite every shard, with `change(name, tensor)` for tensors whose name holds `part`."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        changed = {n: change(n, t) if part in n else t for n, t in tensors.items()}  # type: ignore[operator]
        save_file(changed, file, metadata={"format": "pt"})


def text_file(folder: Path) -> str:
    text = (DEMO.parent / "text/heldout.txt").read_text()[:20_000]
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


def test_a_nan_scale_is_refused_with_file_and_tensor(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "model")

    def poison(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0] = float("nan")
        return tensor

    edit_tensors(folder, "layers.4.block_sparse_moe.experts.3.w2.weight.nested_absmax", poison)
    with pytest.raises(CheckpointError, match=r"safetensors.*layers\.4.*experts\.3\.w2.*nan"):
        run_gate(folder, tmp_path)


def test_a_dead_router_is_refused_with_its_layer(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "model")
    edit_tensors(
        folder, "layers.2.block_sparse_moe.gate.weight", lambda name, t: torch.zeros_like(t)
    )
    with pytest.raises((GateError, CheckpointError), match=r"layer 2|layers\.2"):
        run_gate(folder, tmp_path)


def test_a_non_finite_layer_is_refused_with_its_number(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "model")
    edit_tensors(
        folder, "layers.3.post_attention_layernorm", lambda name, t: torch.full_like(t, 1e38)
    )
    with pytest.raises(GateError, match="layer 3: hidden states are not finite"):
        run_gate(folder, tmp_path)


def swap_experts(folder: Path) -> None:
    """w1 and w3 exchanged in every expert: gate and up projections swapped."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    swap = {".w1.": ".w3.", ".w3.": ".w1."}

    def other(name: str) -> str:
        for old, new in swap.items():
            if old in name:
                return name.replace(old, new)
        return name

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            tensors = {other(name): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"] = {other(name): file for name, file in index["weight_map"].items()}
    index_path.write_text(json.dumps(index))


def wrong_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))


def wrong_norm(folder: Path) -> None:
    edit_tensors(folder, "input_layernorm", lambda name, t: torch.ones_like(t))


@pytest.mark.parametrize("fault", [swap_experts, wrong_rope, wrong_norm])
def test_a_model_that_computes_something_else_is_refused(fault: object, tmp_path: Path) -> None:
    """The first tokens of the text are those of the card: it must find its NLL again."""
    folder = broken_demo(tmp_path / "model")
    run_gate(folder, tmp_path)
    fault(folder)  # type: ignore[operator]
    with pytest.raises(GateError, match=r"model card's 3\.1936|repeated text"):
        run_gate(folder, tmp_path)


def test_a_wrong_rope_theta_is_refused_without_a_card(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "model")
    (folder / "card.json").unlink()
    wrong_rope(folder)
    with pytest.raises(GateError, match=r"a repeated text is only 0\.0.. nats easier, needed 0\.5"):
        run_gate(folder, tmp_path)


def test_a_baseline_whose_logits_overflow_is_refused(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "model")
    edit_tensors(folder, "lm_head.weight", lambda name, t: torch.full_like(t, 3e38))
    settings = EvalSettings(
        tasks=("ppl",), text=text_file(tmp_path), segments=1, prefix=64, continuation=16, gate="off"
    )
    study = prepare_study(load(str(folder), device="cpu"), settings)
    with pytest.raises(GateError, match="perplexity 0: the exact baseline's loss is nan"):
        run_study(study)


def test_somebody_elses_card_is_not_ours(tmp_path: Path) -> None:
    folder = broken_demo(tmp_path / "model")
    for content in ("not json", "[]", '{"gate": {}}'):
        (folder / "card.json").write_text(content)
        run_gate(folder, tmp_path)
