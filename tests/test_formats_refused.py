"""What is refused of FP8, MXFP4, NVFP4 and 4-bit integers: settings, tensors and scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from format_checks import matched, parts_of
from formats import FORMATS, draw_mxfp4
from torch import Tensor

from layersweep.checkpoint.storage import Storage, read_settings
from layersweep.errors import CheckpointError


def compressed(changed: dict[str, object], **weights: object) -> dict[str, object]:
    of_weights = {"num_bits": 4, "type": "int", "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": of_weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, **changed}


@pytest.mark.parametrize(
    ("config", "found", "needed"),
    [
        ({"quant_method": "gptq", "bits": 3}, "bits = 3", "4"),
        ({"quant_method": "gptq", "bits": True}, "bits = true", "4"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
         'checkpoint_format = "marlin"', '"gptq" or "gptq_v2" or nothing'),
        ({"quant_method": "awq", "version": "gemv"}, 'version = "gemv"', '"gemm" or'),
        ({"quant_method": "awq", "zero_point": False}, "zero_point = false", "true"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, 'fmt = "e5m2"', '"e4m3" or nothing'),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]},
         "weight_block_size = [128, 100]", "two multiples of 8"),
        ({"quant_method": "fp8", "rotated": True}, "rotated = true", "no such field"),
        ({"quant_method": "modelopt", "quant_algo": "W4"}, 'quant_algo = "W4"', '"FP8" or "NVFP4"'),
        ({"quant_method": ["mxfp4"]}, 'quant_method = ["mxfp4"]', '"bitsandbytes" or'),
        (compressed({}, num_bits=3), "config_groups.group_0.weights.num_bits = 3", "4 or 8"),
        (compressed({}, dynamic=True), "config_groups.group_0.weights.dynamic = true", "false"),
        (compressed({}, outliers=1), "config_groups.group_0.weights.outliers = 1", "no such field"),
        (compressed({"transform_config": {"config_groups": {}}}), "transform_config = ", "{}"),
        (compressed({"sparsity_config": {"format": "sparse"}}), "sparsity_config = ", "{}"),
        (compressed({"format": "marlin-24"}), 'format = "marlin-24"', '"pack-quantized" or'),
        (compressed({"config_groups": {"a": 7}}), "config_groups.a = 7", "an object"),
    ],
)  # fmt: skip
def test_settings_that_are_not_understood_are_refused_by_name(
    config: object, found: str, needed: str
) -> None:
    _, problems = read_settings({"quantization_config": config}, "config.json")
    (sentence,) = [one.sentence() for one in problems]
    assert sentence.startswith(f"config.json: found quantization_config.{found}")
    assert f"needed {needed}" in sentence


def test_what_is_stated_and_not_done_is_noted() -> None:
    scheme = {"num_bits": 8, "type": "float"}
    config = compressed({"kv_cache_scheme": scheme})
    config["config_groups"]["group_0"]["input_activations"] = scheme  # type: ignore[index]
    found, problems = read_settings({"quantization_config": config}, "config.json")
    assert problems == [] and [one.split(" ")[0] for one in found.notes] == [
        *("weights", "kv_cache_scheme")
    ]
    assert found.ignores("model.layers.0.self_attn.k_scale")
    assert not found.ignores("model.layers.0.self_attn.k_proj.weight_scale")
    assert read_settings({"quantization_config": compressed({})}, "c")[0].notes == ()


def test_blocks_of_two_sizes_are_refused() -> None:
    sizes = ([128, 128], [64, 128])
    groups = {str(size): {"weights": {"block_structure": size}} for size in sizes}
    _, problems = read_settings({"quantization_config": compressed({"config_groups": groups})}, "c")
    assert "block_structure [(64, 128), (128, 128)], needed one size" in problems[0].sentence()


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        ("fp8-blocks", {"weight_scale_inv": None}, "x.weight: found FP8 data with no scale"),
        ("fp8-blocks", {"weight_scale": torch.ones(1)}, "FP8 data with x.weight_scale_inv and x.w"),
        ("fp8-blocks", {"weight_scale_inv": torch.ones(2, 3)},
         "x.weight_scale_inv: found F32 [2, 3], needed F32, F16 or BF16: [1], [32, 1], or [2, 4]"),
        ("fp8-rows", {"weight": torch.ones(32, 95).to(torch.float8_e4m3fn)},
         "x.weight: found F8_E4M3 [32, 95], needed F8_E4M3 [32, 96]"),
        ("nvfp4-modelopt", {"weight_scale": None}, "x.weight: found NVFP4 with one of its tensors"),
        ("nvfp4-packed", {"weight_global_scale": torch.ones(2)}, "found F32 [2], needed F32 [1]"),
        ("nvfp4-modelopt", {"weight_scale": torch.ones(32, 6)}, "needed F8_E4M3 [32, 6]"),
        ("int4", {"weight_scale": None}, "x.weight_packed: found 4-bit integers without scales"),
        ("int4", {"weight_scale": torch.ones(32, 5)}, "needed groups of a multiple of 8"),
        ("int4", {"weight_packed": torch.ones(32, 11).int()}, "I32 [32, 11], needed I32 [32, 12]"),
        ("int4-zeros", {"weight_zero_point": torch.ones(3, 6).int()}, "needed I32 [4, 6]"),
        ("awq", {"qzeros": None}, "x.qweight: found I32 [96, 4] without scales or zero points"),
        ("awq", {"qweight": torch.ones(12, 32).int()}, "found I32 [12, 32], needed I32 [96, 4]"),
        ("gptq", {"g_idx": torch.ones(95).int()}, "x.g_idx: found I32 [95], needed I32 [96]"),
        ("gptq", {"scales": torch.ones(6, 32).int()}, "x.scales: found I32 [6, 32], needed F32 or"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    name: str, changed: dict[str, Tensor | None], sentence: str
) -> None:
    found, _ = FORMATS[name].draw(32, 96, np.random.default_rng(7), False)
    tensors = {f"x.{end}": part for end, part in (found | changed).items() if part is not None}
    storage, problems = matched(tensors, (32, 96), FORMATS[name].settings)
    assert storage is None and any(sentence in one for one in problems), problems


def test_packed_words_without_a_method_are_refused() -> None:
    found, _ = FORMATS["awq"].draw(32, 96, np.random.default_rng(8), False)
    storage, problems = matched({f"x.{end}": part for end, part in found.items()}, (32, 96))
    assert storage is None
    assert 'needed quantization_config.quant_method "awq" or "gptq" in config.json' in problems[0]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"_scales": None}, "x_blocks: found MXFP4 blocks without scales, needed x_scales"),
        ({"_scales": torch.ones(2, 4, 3).byte()}, "found U8 [2, 4, 3], needed U8 [2, 4, 2]"),
        ({"_blocks": torch.ones(2, 4, 2, 8).byte()}, "[2, 4, 2, 8], needed U8 [2, 4, 2, 16]"),
    ],
)  # fmt: skip
def test_mxfp4_that_does_not_fit_is_named(changed: dict[str, Tensor | None], sentence: str) -> None:
    found, _ = draw_mxfp4(2, 4, 64, np.random.default_rng(9), False)
    tensors = {f"x{end}": part for end, part in (found | changed).items() if part is not None}
    storage, problems = matched(tensors, (2, 4, 64))
    assert storage is None and sentence in problems[0], problems


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
        found.append(look.least <= float(values.min()) and float(values.max()) < look.below)
    return found
