"""FP8, MXFP4, NVFP4 and 4-bit integers: what their bytes are, alone and in models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import oracle, ours
from families.small import Tiny
from format_checks import decoded, matched, parts_of
from formats import FORMATS, draw_mxfp4, fp8_by_transformers, repack, repack_mxfp4, write
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import exactly
from torch import Tensor

from layersweep.cli.app import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(list(FORMATS)), st.integers(1, 5), st.integers(1, 6), st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_bytes_are_decoded_as_published(
    name: str, eights: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    form, shape = FORMATS[name], (8 * eights, 16 * groups)
    found, dense = form.draw(*shape, np.random.default_rng(seed), True)
    tensors = {f"x.{end}": part for end, part in found.items()}
    storage, problems = matched(tensors, shape, form.settings)
    assert storage is not None and problems == [] and storage.kind == form.kind
    parts = parts_of(storage, tensors)
    storage.check(parts)
    exactly(decoded(storage, parts, shape, dtype), dense.to(dtype), seed)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_mxfp4_is_decoded_as_by_transformers(
    experts: int, rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    shape = experts, rows, 32 * groups
    found, dense = draw_mxfp4(*shape, np.random.default_rng(seed), True)
    tensors = {f"x{end}": part for end, part in found.items()}
    storage, problems = matched(tensors, shape)
    assert storage is not None and problems == []
    exactly(decoded(storage, parts_of(storage, tensors), shape, dtype), dense.to(dtype), seed)


def test_blocks_of_fp8_are_those_of_transformers() -> None:
    form, rng = FORMATS["fp8-blocks"], np.random.default_rng(0)
    found, dense = form.draw(32, 48, rng, True)
    exactly(fp8_by_transformers(*found.values()), dense, 0)


@pytest.mark.parametrize("name", ["fp8-rows", "nvfp4-packed", "int4-zeros", "awq"])
def test_a_weight_of_several_pieces_is_rounded_once(name: str) -> None:
    form, shape = FORMATS[name], (1160, 1024)
    found, dense = form.draw(*shape, np.random.default_rng(1), False)
    tensors = {f"x.{end}": part for end, part in found.items()}
    storage, _ = matched(tensors, shape, form.settings)
    assert storage is not None
    exactly(
        decoded(storage, parts_of(storage, tensors), shape, torch.bfloat16), dense.bfloat16(), 1
    )


@pytest.mark.parametrize("name", [one for one in FORMATS if one[:3] in ("fp8", "int", "nvf")])
def test_rows_that_are_cut_out_are_the_same(name: str) -> None:
    """As of tensors that hold several weights: rows [16, 48) of 64."""
    form, shape = FORMATS[name], (64, 48)
    found, dense = form.draw(*shape, np.random.default_rng(2), False)
    tensors = {f"x.{end}": part for end, part in found.items()}
    storage, _ = matched(tensors, shape, form.settings)
    assert storage is not None and 16 * 48 % storage.block == 0
    part = storage.cut(16 * 48, 32 * 48, (32, 48))
    parts = []
    for whole, one in zip(storage.stored, part.stored, strict=True):
        data = tensors[whole.name].contiguous().view(-1).view(torch.uint8)
        parts.append(data[one.offset : one.offset + one.nbytes])
    exactly(decoded(part, parts, (32, 48), torch.float32), dense[16:48], 2)


# --- models --------------------------------------------------------------------------------------

MODELS = {
    **{name: Tiny(name) for name in ("llama", "mixtral", "gpt_oss")},
    "deepseek_v3": Tiny("deepseek_v3", {"n_group": 4, "topk_group": 2}),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models in float32, as transformers writes them."""
    found = {}
    for name, tiny in MODELS.items():
        found[name] = tmp_path_factory.mktemp(name)
        oracle.make(tiny, found[name])
    return found


def wanted_losses(source: Path, dense: dict[str, Tensor], folder: Path) -> Tensor:
    """Of the windows, as transformers computes them with those weights."""
    write(source, folder, dense, {})
    return oracle.losses(oracle.opened(folder)).windows


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "llama") for name in FORMATS),
        *((name, "mixtral") for name in ("nvfp4-modelopt", "int4-zeros", "awq")),
        ("fp8-blocks", "deepseek_v3"),
    ],
)
def test_a_model_scores_as_transformers_does_on_its_dense_weights(
    name: str, model: str, published: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    form = FORMATS[name]
    dense = repack(published[model], tmp_path / "packed", form, seed=5)
    found = ours.losses(ours.opened(tmp_path / "packed")).windows
    wanted = wanted_losses(published[model], dense, tmp_path / "dense")
    assert (found - wanted).abs().max() < 1e-4
    assert run(["inspect", str(tmp_path / "packed")]) == 0
    printed = capsys.readouterr().out
    assert f"weights {form.kind}" in printed and form.words in printed


def test_gpt_oss_as_published_scores_as_transformers_does(
    published: dict[str, Path], tmp_path: Path
) -> None:
    dense = repack_mxfp4(published["gpt_oss"], tmp_path / "packed", seed=6)
    model = ours.opened(tmp_path / "packed")
    found = ours.losses(model).windows
    wanted = wanted_losses(published["gpt_oss"], dense, tmp_path / "dense")
    assert (found - wanted).abs().max() < 1e-4
    experts = model.checkpoint.weights["layers.2.experts.7.gate_up_proj"]
    assert (experts.kind, experts.nbytes) == ("mxfp4", 2 * 96 * 64 * 17 // 32)
