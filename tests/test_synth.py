"""Synthetic checkpoints: the published layout, finite activations, spread routing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_shapes import small_shape

from layersweep.checkpoint import nf4, open_checkpoint
from layersweep.checkpoint.synth import synthetic_bytes, write_synthetic
from layersweep.checkpoint.synth_formats import LEVELS_STD
from layersweep.checkpoint.synth_shapes import MIXTRAL_8X7B, Weights
from layersweep.cli.app import run
from layersweep.errors import InputError
from layersweep.study.run import run_study
from layersweep.study.study import prepare_study
from layersweep.sweep.model import load
from layersweep.tasks.settings import EvalSettings

SMALL = MIXTRAL_8X7B.with_fields(
    {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 192,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("synth") / "model"
    write_synthetic(target, SMALL, shard_bytes=4_000_000)
    return target


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_it_is_read_as_published_nested_nf4_with_a_packed_router(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.weights_kind, checkpoint.router_kind) == ("nf4", "nf4")
    assert checkpoint.decoder == SMALL.decoder
    assert checkpoint.decoder.synthetic
    assert checkpoint.weights["layers.31.experts.7.down_proj"].storage.nested is not None
    assert len(checkpoint.files) >= 2


def test_activations_stay_small_and_routing_spread_through_32_layers(
    folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence after another, and then some more of them. " * 300)
    settings = EvalSettings(gate="only", text=str(text))
    study = prepare_study(load(str(folder), device="cpu"), settings)
    run_study(study)
    largest = [check.value for check in study.gate.checks if check.name == "finite"]
    assert len(largest) == 32
    assert max(largest) < 100  # fp16 ends at 65504
    assert min(study.gate.experts_used) >= 7
    # synthetic weights predict nothing and are not asked to
    assert {check.name for check in study.gate.checks} == {
        "finite", "experts used", "router spread", "peak within plan"}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 5])
def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path, threads: int) -> None:
    again = tmp_path / "again"
    write_synthetic(again, SMALL, shard_bytes=4_000_000, threads=threads)
    first = sorted(folder.iterdir())
    assert len(first) == 8
    assert [file.read_bytes() for file in first] == [
        (again / file.name).read_bytes() for file in first
    ]


def test_another_seed_writes_other_bytes(folder: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "other", SMALL, shard_bytes=4_000_000, seed=1)
    mine, other = tensors_in(folder), tensors_in(tmp_path / "other")
    for key in ("lm_head.weight", "model.layers.31.block_sparse_moe.experts.7.w2.weight"):
        assert not torch.equal(mine[key], other[key])


def test_files_are_what_safetensors_would_write(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), tmp_path / file.name, metadata={"format": "pt"})
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_bytes_are_spread_as_meant(folder: Path) -> None:
    tensors = tensors_in(folder)
    embed, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    assert embed.float().std().item() == pytest.approx(1.0, rel=0.01)
    assert head.float().std().item() == pytest.approx(128**-0.5, rel=0.01)
    assert len(embed.unique(dim=0)) == len(embed)
    packed = tensors["model.layers.31.block_sparse_moe.experts.7.w2.weight"].flatten().int()
    # a mean of 0.02, which equally likely levels have, would pull every token one way
    levels = torch.tensor(nf4.NF4_CODE)[torch.cat((packed >> 4, packed & 15))]
    assert abs(levels.mean().item()) < 0.01
    assert levels.std().item() == pytest.approx(LEVELS_STD, rel=0.02)


@pytest.mark.parametrize(
    ("name", "weights", "key", "stored"),
    [
        ("gpt-oss-20b", "mxfp4", "layers.1.experts.7.down_proj", 64 * 96 * 17 // 32),
        ("glm-4.5-air", "fp8", "layers.1.experts.15.down_proj", 64 * 32 + 4),
    ],
)
def test_other_formats_are_written_as_published(
    name: str, weights: Weights, key: str, stored: int, tmp_path: Path
) -> None:
    shape = small_shape(name).with_layers(2).with_weights(weights)
    size = write_synthetic(tmp_path / "model", shape, threads=1)
    assert size == pytest.approx(synthetic_bytes(shape), rel=0.03)  # biases and rest of blocks
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    assert checkpoint.nbytes == size and checkpoint.decoder.synthetic
    weight = checkpoint.weights[key]
    assert (weight.kind, weight.nbytes) == (weights, stored)
    parts = [
        torch.from_numpy(np.fromfile(one.file, np.uint8, one.nbytes, offset=one.offset))
        for one in weight.stored
    ]
    dense = torch.empty(weight.shape)
    weight.storage.packed(parts, weight.shape).decode(dense)
    wanted = (2 * 2 * weight.shape[1]) ** -0.5  # of 2 layers, each writing twice
    assert dense.std().item() == pytest.approx(wanted, rel=0.05)
    assert abs(dense.mean().item()) < 0.05 * wanted


def test_formats_that_a_family_is_not_published_in_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape, weights, needed in (
        ("mixtral-8x7b", "mxfp4", "needed nf4 or fp8"),
        ("gpt-oss-20b", "fp8", "needed nf4 or mxfp4"),
        ("gpt-oss-20b", "q4", "needed one of nf4, fp8, mxfp4"),
    ):
        assert run(["synth", str(tmp_path / "a"), "--shape", shape, "--weights", weights]) == 2
        assert needed in capsys.readouterr().err


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_that_ends_early_leaves_nothing(
    tmp_path: Path, failure: BaseException | type[BaseException]
) -> None:
    def fail(phase: str, done: int, total: int) -> None:
        raise failure

    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_synthetic(tmp_path / "model", SMALL, shard_bytes=4_000_000, progress=fail)
    assert list((tmp_path / "model").iterdir()) == []


def test_progress_ends_at_the_layers_and_the_ends(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    small = SMALL.with_layers(2)
    size = write_synthetic(tmp_path / "model", small, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("writing", 3, 3)
    assert size == open_checkpoint(str(tmp_path / "model")).nbytes


def test_full_size_is_announced_within_one_percent() -> None:
    assert synthetic_bytes(MIXTRAL_8X7B) == pytest.approx(24_483_151_552, rel=0.01)


def test_bad_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for arguments, found in (
        ([str(folder)], "needed an empty folder"),
        ([str(file)], "found a file"),
        ([str(tmp_path / "a"), "--shape", "mixtral-8x7"], "mixtral-8x7b"),
        ([str(tmp_path / "a"), "--layers", "33"], "1 to 32"),
    ):
        assert run(["synth", *arguments]) == 2
        assert found in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
