"""Published methods: their arithmetic written once more, and the packages that hold it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_kv_codecs import codec_of, encode, gaussians, positions_of
from test_kv_reference import CPU, stream_of
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv import Stream
from layersweep.kv.codec import check_stream


def hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


def affine(x: Tensor, bits: int) -> Tensor:
    """Every row between its minimum and its maximum, by fp16 scales."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return ((x - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero


def decoded_by(arm: str, role: str, x: Tensor) -> Tensor:
    codec = codec_of(arm)
    return codec.decode(codec.encode(x, stream_of(role, x), positions_of(x)), positions_of(x))


@pytest.mark.parametrize(("role", "size"), [("key", 128), ("value", 64)])
def test_the_rotation_of_llama_cpp(role: str, size: int) -> None:
    """Keys in one block of a head, values in blocks of 64: H q4_0(H x) with the plain format."""
    x = gaussians(1, 2, 40, 128)
    blocks = torch.block_diag(*[hadamard(size)] * (128 // size))
    expected = decoded_by("q4_0", role, x @ blocks) @ blocks
    # a number that rounding moves across the middle of a step differs by that step
    apart = (decoded_by("q4_0@rotate=1", role, x) - expected).abs().amax(-1)
    assert (apart > 1e-5).float().mean() < 0.02


def test_turboquant_keys_keep_their_length_and_values_are_not_rotated() -> None:
    x = gaussians(1, 2, 40, 64) + 1
    keys = decoded_by("turboquant:K3V3", "key", x)
    assert (keys.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 2**-11
    assert torch.equal(decoded_by("turboquant:K3V3", "value", x), affine(x, 3))
    assert torch.equal(decoded_by("turboquant:K8V3", "key", x), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("role", "place"), [("key", 122), ("value", 117)])
def test_oscar_clips_at_the_published_share_of_magnitudes(role: str, place: int) -> None:
    x = gaussians(1, 2, 40, 128)
    turned = x @ hadamard(128)
    limit = turned.abs().sort(dim=-1).values[..., place, None]
    expected = affine(turned.clamp(-limit, limit), 2) @ hadamard(128)
    assert ((decoded_by("oscar:K2V2", role, x) - expected).abs() > 1e-4).float().mean() < 0.01


def evened(tile: Tensor) -> tuple[Tensor, Tensor]:
    """KVarN's scales of the columns and rows of a tile, as logarithms, as it computes them."""

    def uneven(left: Tensor) -> Tensor:
        spreads = [left.std(dim) for dim in (0, 1)]
        return sum((s.max() / s.min() for s in spreads), torch.zeros(()))

    column, row = torch.zeros(1, tile.shape[1]), torch.zeros(len(tile), 1)
    best, least = (column, row), uneven(tile)
    for _ in range(16):
        left = tile / column.exp() / row.exp()
        column = (column + left.std(0, keepdim=True).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        left = tile / column.exp() / row.exp()
        row = (row + left.std(1, keepdim=True).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        if (found := uneven(tile / column.exp() / row.exp())) <= least:
            best, least = (column, row), found
    return best[0].exp(), best[1].exp()


@pytest.mark.parametrize("size", [0.1, 5.0])
@pytest.mark.parametrize("role", ["key", "value"])
def test_kvarn_evens_a_tile_and_codes_its_rows(role: str, size: float) -> None:
    """Small numbers stay below the smallest scale. Tokens differ in size by a factor of 20."""
    x = gaussians(1, 1, 70, 64) * torch.linspace(0.1, 2, 70).unsqueeze(1) * size
    tile = x[0, 0, :64] @ hadamard(64)
    tile = tile.T if role == "key" else tile  # rows are channels of keys, tokens of values
    column, row = evened(tile)
    left, last = tile / column / row, 2 ** (4 if role == "key" else 2) - 1
    low, high = left.amin(1, keepdim=True), left.amax(1, keepdim=True)
    code = ((left - low) * last / (high - low)).round()
    scale, zero = (row * (high - low) / last).half().float(), (row * low).half().float()
    expected = (code * scale + zero) * column.half().float()
    expected = (expected.T if role == "key" else expected) @ hadamard(64)
    decoded = decoded_by("kvarn:K4V2@group=64", role, x)[0, 0]
    # where no scale can get smaller, all rounds are alike, and rounding takes one: fp16 apart
    assert ((decoded[:64] - expected).abs() > 0.01 * size).float().mean() < 0.01
    assert torch.equal(decoded[64:], x[0, 0, 64:])


# --- packages, where they are installed ---------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_ggml_bytes_are_those_of_its_own_package(bits: int) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    x = gaussians(1, 1, 500, 96)
    expected = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[f"Q{bits}_0"])
    assert np.array_equal(encode(codec_of(f"q{bits}_0"), x).codes.numpy(), expected)


def test_turboquant_is_a_published_package_without_its_signs() -> None:
    """turboquant-plus-vllm, the keys' half of it. Its 4-bit levels stop 2 % short of Lloyd-Max."""
    theirs = pytest.importorskip("turboquant_vllm.torch_ops", reason="it is not installed")
    x = gaussians(1, 1, 500, 128)
    quantizer = theirs.PolarQuantTorch(128, 3, device="cpu")
    quantizer.signs1.fill_(1)
    quantizer.signs2.fill_(1)
    expected = quantizer.dequantize(*quantizer.quantize(x[0, 0], norm_correction=True))
    apart = decoded_by("turboquant:K3V3", "key", x)[0, 0] - expected
    assert (apart.abs().amax(-1) > 5e-3).float().mean() < 0.03


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_e8_is_the_published_package(bits: int) -> None:
    """nexusquant-kv itself, where it is installed, within the fp16 that it stores."""
    pytest.importorskip("nexusquant", reason="nexusquant-kv is not installed")
    theirs, ours = codec_of(f"nexusquant:K{bits}V{bits}"), codec_of(f"e8:K{bits}V{bits}")
    x = gaussians(1, 4, 2048, 128)
    one, other = encode(theirs, x), encode(ours, x)
    assert theirs.nbytes(one) == ours.nbytes(other)
    apart = theirs.decode(one, positions_of(x)) - ours.decode(other, positions_of(x))
    # A tie within float32 rounding may fall to the other side.
    assert (apart.abs().amax(-1) > 4e-3).float().mean().item() < 2e-4
    with pytest.raises(InputError, match="head size 80, needed a power of two"):
        check_stream(theirs, Stream("k", 1, 80, "key", rope=True), CPU, torch.float32)
