"""FP8, MXFP4, NVFP4 and 4-bit integers: what their bytes are, alone and in models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import oracle, ours
from families.small import Tiny
from formats import FORMATS, draw_mxfp4, fp8_by_transformers, repack, repack_mxfp4, write
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import exactly
from torch import Tensor

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage import Headers, Storage, formats_of, read_settings
from layersweep.cli.app import run
from layersweep.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
}  # fmt: skip


def matched(
    tensors: dict[str, Tensor], shape: tuple[int, ...], config: object = None
) -> tuple[Storage | None, list[str]]:
    """How the only weight of some tensors is stored, or what is wrong with it."""
    stored = {
        name: StoredTensor(name, Path("f"), NAMES[one.dtype], tuple(one.shape), 0, one.nbytes)
        for name, one in tensors.items()
    }
    stated, refused = read_settings({"quantization_config": config}, "config.json")
    headers = Headers(stored, None, refused, {}, stated)
    base = next(name for name in ("x.weight", "x_blocks") if name in formats_of(stored))
    found = formats_of(stored)[base].match(headers, base, shape)
    return found, [one.sentence() for one in headers.problems]


def parts_of(storage: Storage, tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[one.name].contiguous().view(-1).view(torch.uint8) for one in storage.stored]


def decoded(
    storage: Storage, parts: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    out = torch.full(shape, 7.0, dtype=dtype)
    storage.packed(parts, shape).decode(out)
    return out


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


# --- scales that cannot be -----------------------------------------------------------------------

NAN, BELOW = float("nan"), -1.0


@pytest.mark.parametrize(
    ("name", "end", "value"),
    [
        ("fp8-blocks", "weight_scale_inv", NAN),
        ("fp8-rows", "weight_scale", BELOW),
        ("fp8-tensor", "weight_scale", float("inf")),
        ("nvfp4-modelopt", "weight_scale", NAN),
        ("nvfp4-modelopt", "weight_scale", BELOW),
        ("nvfp4-packed", "weight_global_scale", 0.0),
        ("awq", "scales", NAN),
        ("gptq-sorted", "g_idx", 6),
        ("int4-sorted", "weight_g_idx", -1),
    ],
)
def test_scales_that_cannot_be_are_seen_at_a_glance_and_refused(
    name: str, end: str, value: float
) -> None:
    form, shape = FORMATS[name], (32, 96)
    found, _ = form.draw(*shape, np.random.default_rng(3), False)
    tensors = {f"x.{key}": part.contiguous() for key, part in found.items()}
    storage, _ = matched(tensors, shape, form.settings)
    assert storage is not None
    assert all(glanced(storage, parts_of(storage, tensors)))
    tensors[f"x.{end}"].view(-1)[0] = value
    parts = parts_of(storage, tensors)
    assert not all(glanced(storage, parts))
    with pytest.raises(CheckpointError, match=rf"f: x\.{end}: found (a scale|group) .*needed"):
        storage.check(parts)


def test_the_power_that_is_no_number_is_refused() -> None:
    found, _ = draw_mxfp4(2, 4, 64, np.random.default_rng(4), False)
    tensors = {f"x{end}": part for end, part in found.items()}
    storage, _ = matched(tensors, (2, 4, 64))
    assert storage is not None and all(glanced(storage, parts_of(storage, tensors)))
    tensors["x_scales"][1, 2, 1] = 255
    parts = parts_of(storage, tensors)
    assert not all(glanced(storage, parts))
    with pytest.raises(CheckpointError, match=r"x_scales: found a scale of inf at index 13"):
        storage.check(parts)


def glanced(storage: Storage, parts: list[Tensor]) -> list[bool]:
    """Of each look, as stream/scales.py looks."""
    found = []
    for look in storage.looks:
        memory = parts[look.piece].numpy()
        values = np.ndarray((look.count,), look.dtype, memory, look.first, (look.step,))
        found.append(look.least <= float(values.min()) and float(values.max()) < look.limit)
    return found


# --- models --------------------------------------------------------------------------------------

MODELS = {"llama": Tiny("llama"), "mixtral": Tiny("mixtral"), "gpt_oss": Tiny("gpt_oss")}


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
        *((name, "mixtral") for name in ("fp8-blocks", "nvfp4-modelopt", "int4-zeros", "awq")),
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
