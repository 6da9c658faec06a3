"""Codecs: rate, distortion, and the promises of the codec contract."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv import Stream, parse
from layersweep.kv.codec import Codec, Packed
from layersweep.kv.e8 import group_bits
from layersweep.kv.lloyd_tables import POSITIVE_LEVELS
from layersweep.kv.packing import pack_bits, unpack_bits
from layersweep.kv.rotate import block_sizes, rotate, rotate_back

BITS = [1, 2, 3, 4, 5, 6, 8]
ARMS = [
    *("lloyd:K{0}V{0}", "e8:K{0}V{0}", "e8:K{0}V{0}@v=0.5"),
    *("turbo:K{0}V{0}", "voronoi:K{0}V{0}", "trellis:K{0}V{0}"),
]
# numba compiles a search of its own for each number of bits, and for these it takes seconds.
LONG_COMPILED = (5, 6)
RATES = [
    pytest.param(arm, bits, marks=pytest.mark.slow)
    if arm.startswith("trellis") and bits in LONG_COMPILED
    else (arm, bits)
    for arm in ARMS
    for bits in BITS
]


def codec_of(text: str) -> Codec:
    codec = parse(text).codec
    assert codec is not None
    return codec


def keys(heads: int, dim: int) -> Stream:
    return Stream("k", heads, dim, "key", rope=True)


def positions_of(x: Tensor, start: int = 0) -> Tensor:
    return torch.arange(start, start + x.shape[2]).expand(x.shape[0], -1)


def encode(codec: Codec, x: Tensor) -> Packed:
    return codec.encode(x, keys(x.shape[1], x.shape[3]), positions_of(x))


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(encode(codec, x), positions_of(x))


def gaussians(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: Packed, b: Packed) -> bool:
    assert a.scale is not None
    assert b.scale is not None
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


# --- distortion on unit Gaussians, d = 128 -------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("e8:K2V2", 0.1366),
        ("e8:K3V2", 0.0342),
        ("e8:K4V2", 0.00855),
        ("e8:K3V2@v=0.5", 0.0342 * 1.089),
    ],
)
def test_e8_error(arm: str, expected: float) -> None:
    x = gaussians(1, 4, 16384, 128)
    mse = (round_trip(codec_of(arm), x) - x).square().mean().item()
    assert mse == pytest.approx(expected, rel=0.006)


@pytest.mark.parametrize(
    ("bits", "plain", "with_gain"),
    [(2, 0.1160, 0.1304), (3, 0.0340, 0.03475), (4, 0.00933, 0.00926)],
)
def test_lloyd_error(bits: int, plain: float, with_gain: float) -> None:
    """`plain` is the error d of the same codes with the RMS as their scale. The gain makes it about
    d / (1 - d), a little less, because it also fits each vector."""
    x = gaussians(1, 4, 16384, 128)
    codec = codec_of(f"lloyd:K{bits}V{bits}")
    packed = encode(codec, x)
    x_hat = codec.decode(packed, positions_of(x))
    assert packed.scale is not None
    rms = x.square().mean(-1).sqrt()
    ungained = x_hat * (rms / packed.scale.float()).unsqueeze(-1)
    assert (ungained - x).square().mean().item() == pytest.approx(plain, rel=0.006)
    error = (x_hat - x).square().mean().item()
    assert error == pytest.approx(with_gain, rel=0.006)
    assert error == pytest.approx(plain / (1 - plain), rel=0.025)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", BITS)
def test_lloyd_keeps_the_inner_product(bits: int, dim: int) -> None:
    """<x, x^> = <x, x> within the rounding of the fp16 scale, 2^-11, for Gaussians and others."""
    x = torch.cat([gaussians(1, 2, 500, dim), gaussians(1, 2, 500, dim, seed=1) ** 3 + 2], dim=2)
    gain = (x * round_trip(codec_of(f"lloyd:K{bits}V{bits}"), x)).sum(-1) / x.square().sum(-1)
    assert (gain - 1).abs().max().item() < 2**-11 + 1e-5


@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)]
)
def test_table_distortion(bits: int, distortion: float) -> None:
    levels = POSITIVE_LEVELS[bits]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    total = sum(
        quad(lambda z, c=c: (z - c) ** 2 * norm.pdf(z), low, high)[0]
        for c, low, high in zip(levels, edges, edges[1:], strict=False)
    )
    assert 2 * total == pytest.approx(distortion, rel=5e-4)


@pytest.mark.parametrize("bits", BITS)
def test_table_levels_are_the_means_of_their_cells(bits: int) -> None:
    levels = POSITIVE_LEVELS[bits]
    assert len(levels) == 2 ** (bits - 1)
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        mean = (norm.pdf(low) - norm.pdf(high)) / (norm.sf(low) - norm.sf(high))
        assert mean == pytest.approx(level, abs=2e-6)


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.374), (3, 3.274), (4, 4.232)])
def test_e8_counts_its_true_fixed_rate(bits: int, expected: float) -> None:
    x = gaussians(2, 2, 33, 128)
    codec = codec_of(f"e8:K{bits}V{bits}")
    assert 8 * codec.nbytes(encode(codec, x)) / x.numel() == pytest.approx(expected, abs=7e-4)


def test_e8_alphabet_at_one_bit_by_enumeration() -> None:
    """Even-sum tuples of {-1, 0, 1} and all of {-1/2, 1/2}: counted one by one."""
    integers = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 8)
    even = int((integers.sum(1) % 2 == 0).sum())
    assert even == 3281
    assert group_bits(1) == math.log2(3281 + 256)
    assert group_bits(2) == math.log2(195_313 + 65_536)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_lloyd_stores_what_it_counts(bits: int, dim: int) -> None:
    codec, x = codec_of(f"lloyd:K{bits}V{bits}"), gaussians(2, 3, 5, dim)
    packed = encode(codec, x)
    assert packed.scale is not None
    assert packed.codes.dtype == torch.uint8
    assert packed.scale.dtype == torch.float16
    stored = sum(t.numel() * t.element_size() for t in (packed.codes, packed.scale))
    assert codec.nbytes(packed) == stored == 30 * (dim * bits // 8 + 2)


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    groups=st.integers(1, 20),
    count=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_packing_is_reversible(bits: int, groups: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (8 * groups, count), generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.shape == (count, groups * bits)
    assert torch.equal(unpack_bits(packed, bits), codes.int())


# --- the contract --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    arm=st.sampled_from(ARMS),
    bits=st.sampled_from([bits for bits in BITS if bits not in LONG_COMPILED]),
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.sampled_from([8, 64, 80, 96])
    ),
    cut=st.integers(0, 40),
    seed=st.integers(0, 99),
)
@example(arm=ARMS[0], bits=3, shape=(2, 2, 1500, 64), cut=1001, seed=0)  # several chunks
@example(arm=ARMS[1], bits=3, shape=(2, 2, 1500, 64), cut=1001, seed=0)
def test_batch_order_and_append_change_no_bit(
    arm: str, bits: int, shape: tuple[int, int, int, int], cut: int, seed: int
) -> None:
    codec, x = codec_of(arm.format(bits)), gaussians(*shape, seed=seed)
    whole = encode(codec, x)
    decoded = codec.decode(whole, positions_of(x))
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.float32
    for b in range(len(x)):
        alone = encode(codec, x[b : b + 1])
        assert same(alone, whole.slice_batch(b, b + 1))
        assert torch.equal(codec.decode(alone, positions_of(x[:1])), decoded[b : b + 1])
    assert same(encode(codec, x.flip(0, 2)), encode_flipped(whole))
    cut = min(cut, shape[2])
    first, rest = x[:, :, :cut], x[:, :, cut:]
    appended = codec.append(encode(codec, first), rest, positions_of(rest, cut))
    assert appended.tokens == shape[2]
    assert same(appended, whole)
    middle = whole.slice_tokens(cut // 2, cut)
    assert torch.equal(codec.decode(middle, positions_of(first)), decoded[:, :, cut // 2 : cut])


def encode_flipped(packed: Packed) -> Packed:
    assert packed.scale is not None
    return Packed(packed.bits, packed.dim, packed.codes.flip(0, 2), packed.scale.flip(0, 2))


@pytest.mark.parametrize("arm", ["lloyd:K3V3", "e8:K3V3"])
def test_a_transposed_projection_and_inference_mode_change_nothing(arm: str) -> None:
    codec, x = codec_of(arm), gaussians(2, 900, 4, 64)
    with torch.inference_mode():
        strided = round_trip(codec, x.transpose(1, 2))
    assert torch.equal(strided, round_trip(codec, x.transpose(1, 2).contiguous()))


@pytest.mark.parametrize(("arm", "bits"), RATES)
def test_zero_and_constant_vectors(arm: str, bits: int) -> None:
    codec = codec_of(arm.format(bits))
    assert torch.equal(round_trip(codec, torch.zeros(1, 1, 3, 64)), torch.zeros(1, 1, 3, 64))
    constant = round_trip(codec, torch.full((1, 1, 3, 64), -2.5))
    assert torch.isfinite(constant).all()
    if arm.startswith("lloyd") or bits > 1:  # e8 at 1 bit moves the one nonzero coordinate to 0
        assert constant.mean().item() == pytest.approx(-2.5, rel=0.2)


@pytest.mark.parametrize("size", [1e-3, 3e4])
@pytest.mark.parametrize("arm", ["lloyd:K4V4", "e8:K4V4"])
def test_small_and_large_vectors_keep_their_relative_error(arm: str, size: float) -> None:
    x = gaussians(1, 1, 512, 64)
    error = (round_trip(codec_of(arm), x * size) / size - x).square().mean().item()
    assert error == pytest.approx((round_trip(codec_of(arm), x) - x).square().mean().item(), 0.01)


def test_limits_of_the_fp16_scale() -> None:
    codec, x = codec_of("lloyd:K4V4"), gaussians(1, 1, 64, 64)
    assert not torch.isfinite(round_trip(codec, x * 1e6)).any()
    assert not torch.isfinite(round_trip(codec, x * 1e25)).any()
    assert torch.equal(round_trip(codec, x * 1e-9), torch.zeros_like(x))
    subnormal = round_trip(codec, x * 1e-6) * 1e6
    assert (subnormal - x).square().mean().item() < 0.015


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("arm", "bits"), RATES)
def test_non_finite_input_stays_visible_and_stays_alone(arm: str, bits: int, poison: float) -> None:
    codec, x = codec_of(arm.format(bits)), gaussians(1, 2, 9, 64)
    clean = round_trip(codec, x)
    x[0, 1, 4, 7] = poison
    decoded = round_trip(codec, x)
    assert not torch.isfinite(decoded[0, 1, 4]).any()
    decoded[0, 1, 4] = clean[0, 1, 4]
    assert torch.equal(decoded, clean)


def test_half_precision_input() -> None:
    x = gaussians(1, 2, 9, 64).half()
    for arm in ("lloyd:K3V3", "e8:K3V3"):
        assert torch.equal(round_trip(codec_of(arm), x), round_trip(codec_of(arm), x.float()))


def test_sharing_keys_name_method_options_and_the_bits_of_the_role() -> None:
    key, value = keys(2, 64), Stream("v", 2, 64, "value", rope=False)
    k3v2, k4v2 = codec_of("lloyd:K3V2"), codec_of("lloyd:K4V2")
    assert k3v2.sharing_key(value) == k4v2.sharing_key(value)
    assert k3v2.sharing_key(key) != k4v2.sharing_key(key)
    assert k3v2.sharing_key(value) != codec_of("e8:K3V2").sharing_key(value)
    assert codec_of("e8:K3V2").sharing_key(key) != codec_of("e8:K3V2@v=0.5").sharing_key(key)


def test_refused_shapes() -> None:
    codec = codec_of("lloyd:K3V2")
    with pytest.raises(InputError, match=r"found shape \[1, 2, 3, 64\], needed \[batch, 4, "):
        codec.encode(gaussians(1, 2, 3, 64), keys(4, 64), torch.zeros(1, 3))
    with pytest.raises(InputError, match="head size 60, needed a multiple of 8"):
        encode(codec, gaussians(1, 2, 3, 60))
    with pytest.raises(InputError, match="keeps none"):
        codec.encode(gaussians(1, 2, 3, 64), keys(2, 64), torch.zeros(1, 3), torch.zeros(2, 64))


# --- transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("randomized", [False, True])
def test_rotation_is_orthonormal(dim: int, randomized: bool) -> None:
    matrix = rotate(torch.eye(dim), randomized)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-6, rtol=0)
    x = gaussians(50, dim)
    torch.testing.assert_close(rotate_back(rotate(x, randomized), randomized), x)


def test_plain_rotation_is_sylvesters() -> None:
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    h16 = torch.kron(torch.kron(h2, h2), torch.kron(h2, h2))
    x = gaussians(7, 80)
    torch.testing.assert_close(rotate(x, False)[64:], h16 @ x.T[64:] / 4)
    assert block_sizes(80) == [64, 16]
    assert block_sizes(96) == [64, 32]
    assert block_sizes(128) == [128]


@pytest.mark.parametrize("arm", ["identity:lloyd", "identity:e8"])
def test_identity_only_rotates(arm: str) -> None:
    codec, x = codec_of(arm), gaussians(2, 2, 33, 80)
    packed = encode(codec, x)
    error = (codec.decode(packed, positions_of(x)) - x).abs().max().item()
    assert 0 < error < 3e-6
    assert codec.nbytes(packed) == 2 * x.numel()
    first = encode(codec, x[:, :, :10])
    appended = codec.append(first, x[:, :, 10:], positions_of(x)[:, 10:])
    assert torch.equal(appended.codes, packed.codes)


def test_identity_of_a_codec_is_the_identity_arm() -> None:
    assert codec_of("e8:K3V2").identity() == codec_of("identity:e8")
    assert codec_of("lloyd:K3V2").identity() == codec_of("identity:lloyd")
