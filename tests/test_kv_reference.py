"""Reference arms: rate, distortion, bytes of the published formats, and the codec contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_codecs import codec_of, encode, gaussians, positions_of
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv import Stream, parse_arms
from layersweep.kv.codec import Codec, Packed, check_stream, grouping
from layersweep.kv.groups import TokenGroups
from layersweep.kv.identity import Untransformed
from layersweep.tasks.perplexity.task import control_arms

# Every arm, and the multiple that a head size must be of.
ARMS = {
    "turbo:K3V2": 8,
    "turboquant:K3V4": 8,
    "turboquant:K8V3": 8,
    "kvarn:K4V2@group=64": 8,
    "oscar:K2V2": 8,
    "voronoi:K3V2": 8,
    "kivi:K3V2": 32,
    "kivi:K3V2@residual=32": 32,
    "int4": 64,
    "int2": 64,
    "int4@group=32": 32,
    "int2@group=128": 128,
    "q8_0": 32,
    "q4_0": 32,
    "q5_0": 32,
    "q4_0@rotate=1": 64,
    "q5_0@rotate=1": 64,
    "fp8": 8,
}
DIMS = (64, 80, 96, 128, 256)
# Those with tokens that stay exact, or numbers without a scale, have other limits of size.
SCALED = [arm for arm in ARMS if "residual" not in arm and "K8" not in arm]


CPU = torch.device("cpu")


def stream_of(role: str, x: Tensor) -> Stream:
    is_key = role == "key"
    return Stream(role, x.shape[1], x.shape[3], "key" if is_key else "value", rope=is_key)


def same(a: Packed, b: Packed) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in pairs)


# --- distortion on unit Gaussians, d = 128, and the bits that it costs ---------------------------


@pytest.mark.parametrize(
    ("arm", "role", "bits", "mse"),
    [
        ("turbo:K2V2", "key", 2.125, 0.1160),
        ("turbo:K3V3", "key", 3.125, 0.0340),
        ("turbo:K4V4", "key", 4.125, 0.00933),
        ("kivi:K2V2", "value", 3.0, 0.1544),
        ("kivi:K3V3", "value", 4.0, 0.0281),
        ("kivi:K4V4", "value", 5.0, 0.0061),
        ("kivi:K2V2", "key", 3.0, 0.1544),
        ("kivi:K4V4", "key", 5.0, 0.0061),
        ("int2@group=32", "key", 3.0, 0.1544),
        # |x^| = |x| costs a little of the error, and gives the inner products of keys
        ("turboquant:K4V4", "key", 4.125, 0.00925),
        ("turboquant:K3V3", "key", 3.125, 0.0340),
        ("turboquant:K3V3", "value", 3.25, 0.0459),
        ("turboquant:K8V4", "key", 8.0, 0.000705),
        ("oscar:K2V2", "key", 2.25, 0.1560),
        ("oscar:K2V2", "value", 2.25, 0.1271),
        ("kivi:K2V2@residual=128", "value", 3.0 + 13 / 32, 0.1544 * 31 / 32),
        ("kivi:K2V2@residual=128", "key", 3.0, 0.1544),
        # 0.0663, 0.0168 and 0.00429 have been reported for this design. At 2 bits the nearest of
        # all 65,536 points had 0.0719 under the best of three sets of 4 scales that were tried.
        ("voronoi:K2V2", "key", 2.375, 0.0814),
        ("voronoi:K3V3", "key", 3.375, 0.01815),
        ("voronoi:K4V4", "key", 4.375, 0.00447),
    ],
)
def test_error_and_true_bits(arm: str, role: str, bits: float, mse: float) -> None:
    codec, x = codec_of(arm), gaussians(1, 4, 4096, 128)
    packed = codec.encode(x, stream_of(role, x), positions_of(x))
    assert 8 * codec.nbytes(packed) / x.numel() == bits
    error = (codec.decode(packed, positions_of(x)) - x).square().mean().item()
    assert error == pytest.approx(mse, rel=0.01)


@pytest.mark.parametrize(
    ("arm", "bits"),
    [("int4", 4.5), ("int2", 2.5), ("int4@group=32", 5.0), ("int2@group=128", 2.25),
     ("q8_0", 8.5), ("q5_0", 5.5), ("q4_0", 4.5), ("q4_0@rotate=1", 4.5), ("fp8", 8.125)],
)  # fmt: skip
def test_true_bits_per_element(arm: str, bits: float) -> None:
    codec, x = codec_of(arm), gaussians(1, 4, 64, 128)
    assert 8 * codec.nbytes(encode(codec, x)) / x.numel() == bits


def test_error_of_the_formats_without_a_published_figure() -> None:
    """Measured here: what a change of the arithmetic would move."""
    x = gaussians(1, 2, 2048, 128)

    def error(arm: str) -> float:
        codec = codec_of(arm)
        return (codec.decode(encode(codec, x), positions_of(x)) - x).square().mean().item()

    assert error("int2") == pytest.approx(0.2031, rel=0.01)
    assert error("int4") == pytest.approx(0.00805, rel=0.01)
    assert error("q4_0") == pytest.approx(0.00741, rel=0.01)
    assert error("q4_0@rotate=1") == pytest.approx(0.00741, rel=0.01)
    assert error("q5_0") == pytest.approx(0.00182, rel=0.01)
    assert error("q8_0") == pytest.approx(2.9e-5, rel=0.02)
    assert error("fp8") == pytest.approx(6.6e-4, rel=0.01)


def test_rotation_helps_q4_0_with_an_outlier_channel() -> None:
    x = gaussians(1, 2, 512, 128)
    x[..., 5] += 12
    errors = []
    for arm in ("q4_0", "q4_0@rotate=1"):
        codec = codec_of(arm)
        errors.append((codec.decode(encode(codec, x), positions_of(x)) - x).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


# --- bytes of published formats ------------------------------------------------------------------


def ggml_q8_0(x: np.ndarray) -> np.ndarray:
    """quantize_row_q8_0_ref: x [N, 32] float32 -> [N, 34] bytes."""
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    scaled = x * inverse
    q = (np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))).astype(np.int8)  # roundf
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=1)


def ggml_q4_0(x: np.ndarray) -> np.ndarray:
    """quantize_row_q4_0_ref: x [N, 32] float32 -> [N, 18] bytes."""
    largest = np.abs(x).argmax(1)  # the first of equals
    d = (np.take_along_axis(x, largest[:, None], 1) + np.float32(0)) / np.float32(-8)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    q = np.minimum(15, (x * inverse + np.float32(8.5)).astype(np.int8)).astype(np.uint8)
    packed = q[:, :16] | q[:, 16:] << 4
    return np.concatenate([d.astype(np.float16).view(np.uint8), packed], axis=1)


@pytest.mark.parametrize(("arm", "reference"), [("q8_0", ggml_q8_0), ("q4_0", ggml_q4_0)])
def test_ggml_bytes(arm: str, reference: object) -> None:
    blocks = gaussians(3000, 32)
    blocks[:500] = (blocks[:500] * 8).round() / 8  # equal magnitudes, and products that are halves
    blocks[500:600, 7] = 127 / 8
    blocks[600:700] *= 1e4
    blocks[700:800] *= 1e-3
    blocks[800] = 0
    blocks[801] = -0.0
    blocks[802] = 3
    blocks[803, ::2], blocks[803, 1::2] = 5, -5
    codes = encode(codec_of(arm), blocks.view(1, 1, -1, 96)).codes
    expected = reference(blocks.numpy())  # type: ignore[operator]
    assert np.array_equal(codes.reshape(len(blocks), -1).numpy(), expected)


def test_fp8_is_the_nearest_e4m3_number() -> None:
    x = gaussians(1, 1, 200, 64)
    packed = encode(codec_of("fp8"), x)
    assert packed.scale is not None
    scale = x.abs().amax(-1) / 448
    assert torch.equal(packed.scale, scale.half())
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    target = (x / packed.scale.float()[..., None]).clamp(-448, 448)
    nearest = (target[..., None] - every).abs().amin(-1)
    chosen = packed.codes.view(torch.float8_e4m3fn).float()
    assert torch.equal((chosen - target).abs(), nearest)


def test_int4_is_the_affine_map_of_the_group() -> None:
    x = gaussians(1, 2, 40, 128)
    codec = codec_of("int4")
    groups = x.view(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale, zero = ((high - low) / 15).half().float(), low.half().float()
    expected = ((groups - zero) / scale).round().clamp(0, 15) * scale + zero
    assert torch.equal(codec.decode(encode(codec, x), positions_of(x)), expected.view(x.shape))


def test_kivi_keys_are_per_channel_and_the_last_ones_exact() -> None:
    x = gaussians(1, 1, 70, 64)
    codec = codec_of("kivi:K2V2")
    packed = encode(codec, x)
    assert isinstance(packed, TokenGroups)
    decoded = codec.decode(packed, positions_of(x))
    assert torch.equal(decoded[:, :, 64:], x[:, :, 64:])
    column = x[0, 0, 32:64, 3]
    scale = ((column.max() - column.min()) / 3).half().float()
    zero = column.min().half().float()
    expected = ((column - zero) / scale).round().clamp(0, 3) * scale + zero
    assert torch.equal(decoded[0, 0, 32:64, 3], expected)
    assert 8 * codec.nbytes(packed) == 64 * (64 * 3 + 6 * 16)


def test_kivi_with_a_residual_keeps_the_last_values_and_the_keys_of_an_unfilled_block() -> None:
    """300 tokens at 128: 256 keys are coded, in groups of 32 still, and 172 values."""
    codec, plain, x = (
        codec_of("kivi:K2V2@residual=128"),
        codec_of("kivi:K2V2"),
        gaussians(1, 1, 300, 64),
    )
    for role, coded in (("key", 256), ("value", 172)):
        stream = stream_of(role, x)
        packed = codec.encode(x, stream, positions_of(x))
        decoded = codec.decode(packed, positions_of(x))
        assert 8 * codec.nbytes(packed) == 64 * (coded * 3 + (300 - coded) * 16)
        assert torch.equal(decoded[:, :, coded:], x[:, :, coded:])
        every = plain.decode(plain.encode(x, stream, positions_of(x)), positions_of(x))
        assert torch.equal(decoded[:, :, :coded], every[:, :, :coded])


# --- the contract --------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    arm=st.sampled_from(list(ARMS)),
    role=st.sampled_from(["key", "value"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 75)),
    dim=st.sampled_from(DIMS),
    cuts=st.tuples(st.integers(0, 75), st.integers(0, 75)),
    seed=st.integers(0, 99),
)
def test_batch_order_slices_and_append_change_no_bit(
    arm: str, role: str, shape: tuple[int, int, int], dim: int, cuts: tuple[int, int], seed: int
) -> None:
    codec, x = codec_of(arm), gaussians(*shape, dim, seed=seed).half()
    stream, at = stream_of(role, x), positions_of(x)
    if dim % ARMS[arm] and not (arm.startswith("kivi") and role == "key"):
        with pytest.raises(InputError, match=f"has head size {dim}, needed a multiple of"):
            check_stream(codec, stream, CPU, torch.float32)
        return
    whole = codec.encode(x, stream, at)
    assert whole.held_bytes == codec.nbytes(whole)
    assert (whole.tokens, whole.elements) == (shape[2], x.numel())
    decoded = codec.decode(whole, at)
    assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)
    flipped = codec.encode(x.flip(0), stream, at)
    for index in range(len(x)):
        alone = codec.encode(x[index : index + 1], stream, at[:1])
        assert same(alone, whole.slice_batch(index, index + 1).moved(torch.clone))
        assert same(alone, flipped.slice_batch(len(x) - 1 - index, len(x) - index))
        assert torch.equal(codec.decode(alone, at[:1]), decoded[index : index + 1])
    first, second = sorted(min(cut, shape[2]) for cut in cuts)
    grown = codec.encode(x[:, :, :first], stream, at[:, :first])
    for part in (slice(first, second), slice(second, None)):
        grown = codec.append(grown, x[:, :, part], at[:, part])
    assert same(grown, whole)
    middle = whole.slice_tokens(first, second)
    assert torch.equal(codec.decode(middle, at[:, first:second]), decoded[:, :, first:second])


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("arm", SCALED)
def test_special_vectors(arm: str, role: str) -> None:
    """Zero stays zero, a constant nearly so, fp16's limits of size, and non-finite stays visible
    and, but for a group's other tokens, alone."""
    codec, x = codec_of(arm), gaussians(1, 2, 64, 128)
    stream, at = stream_of(role, x), positions_of(x)

    def through(some: Tensor) -> Tensor:
        return codec.decode(codec.encode(some, stream, at), at)

    assert torch.equal(through(torch.zeros_like(x)), torch.zeros_like(x))
    constant = through(torch.full_like(x, -2.5))
    # the plain Hadamard matrix makes one spike of it, which these were not made for
    if not arm.startswith(("turboquant", "kvarn", "oscar")):
        assert constant.mean().item() == pytest.approx(-2.5, rel=0.2)
    clean = through(x)
    for size in () if arm.startswith("kvarn") else (1e-3, 1e3):  # whose scales have limits
        error = (through(x * size) / size - clean).square().mean()
        assert error < 0.02 * clean.square().mean()
    assert through(x * 1e-12).abs().max() < 1e-10
    assert not torch.isfinite(through(x * 1e9)).any()
    for poison in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[0, 1, 9, 7] = poison
        decoded = through(bad)
        assert not torch.isfinite(decoded[0, 1, 9, 7])
        assert torch.equal(decoded[0, 0], clean[0, 0])
        same = torch.ones(64, 128, dtype=torch.bool)
        if arm.startswith("kivi") and role == "key":
            same[:32, 7] = False
        else:
            tile = grouping(codec, role).group  # type: ignore[arg-type]
            same[9 // tile * tile :][:tile] = False
        assert torch.equal(decoded[0, 1][same], clean[0, 1][same])


def test_the_identity_of_a_codec_without_transforms_changes_nothing() -> None:
    x = gaussians(1, 2, 9, 64)
    for arm in ("identity:kivi", "identity:int4", "identity:q8_0", "identity:fp8"):
        codec: Codec = codec_of(arm)
        assert isinstance(codec, Untransformed)
        assert torch.equal(codec.decode(encode(codec, x), positions_of(x)), x)
    rotated = codec_of("identity:q4_0@rotate=1")
    assert not torch.equal(rotated.decode(encode(rotated, x), positions_of(x)), x)


@pytest.mark.parametrize("arm", ["int4@group=128", "/no/such/file.py:Mine:K3V2"])
def test_a_study_with_an_arm_that_cannot_work_does_not_open(arm: str) -> None:
    """The demo's head size is 64; nothing but its headers has been read."""
    import layersweep
    from layersweep.study.study import prepare_study
    from layersweep.tasks.settings import EvalSettings

    model = layersweep.load("demo", device="cpu")
    with pytest.raises(InputError, match=r"found no file|'k' has head size 64, needed a multiple"):
        prepare_study(model, EvalSettings(kv=f"e8:K3V2,{arm}"))


def test_controls_are_the_transforms_of_each_method_of_ours() -> None:
    arms = parse_arms("q4_0,q4_0@rotate=1,own.py:Mine:K3V2,e8:K4V2,e8:K3V2")
    controls = dict(control_arms(arms))
    assert list(controls) == ["identity:q4_0", "identity:e8", "exact"]
    assert controls["identity:q4_0"].name == "identity:q4_0@rotate=1"
