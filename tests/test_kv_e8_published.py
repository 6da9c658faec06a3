"""`e8` against a slow and literal form of its arithmetic, and against the published program."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from layersweep.kv import Stream, parse

LIMIT_OF_FLIPS = 2e-4  # vectors in which a tie within float32 rounding falls to the other side


def literal_group(u: list[float], levels: int, smallest: bool) -> list[float]:
    """One group of 8, coordinate by coordinate, distances as sums of squares."""
    a = [float(round(v)) for v in u]
    if sum(a) % 2:
        gaps = [abs(v - w) for v, w in zip(u, a, strict=True)]
        i = gaps.index(min(gaps) if smallest else max(gaps))
        a[i] += 1 if u[i] - a[i] >= 0 else -1
    b = [round(v - 0.5) + 0.5 for v in u]

    def distance(point: list[float]) -> float:
        return sum((v - w) ** 2 for v, w in zip(u, point, strict=True))

    chosen = b if distance(b) < distance(a) else a
    return [min(max(v, -levels / 2), levels / 2) for v in chosen]


def literal(x: Tensor, bits: int, smallest: bool) -> Tensor:
    """[N, D] -> [N, D], D a power of two."""
    h = torch.ones(1, 1)
    while len(h) < x.shape[1]:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    h = h / x.shape[1] ** 0.5
    rows = []
    for y in x @ h:
        scale = y.abs().max() / 2 ** (bits - 1)
        u = (y / scale).tolist()
        points = [literal_group(u[i : i + 8], 2**bits, smallest) for i in range(0, len(u), 8)]
        rows.append(torch.tensor(list(itertools.chain(*points))) * scale)
    return torch.stack(rows) @ h


def ours(x: Tensor, arm: str) -> Tensor:
    """[N, D] -> [N, D] through the codec's packed form."""
    codec = parse(arm).codec
    assert codec is not None
    x = x[None, None]
    positions = torch.arange(x.shape[2])[None]
    stream = Stream("k", 1, x.shape[3], "key", rope=True)
    return codec.decode(codec.encode(x, stream, positions), positions)[0, 0]


def differing(a: Tensor, b: Tensor) -> float:
    """Share of vectors that differ by more than rounding."""
    return ((a - b).abs().amax(1) > 2e-5).float().mean().item()


@pytest.mark.parametrize("version", ["0.6", "0.5"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_equals_the_literal_form(bits: int, version: str) -> None:
    x = torch.randn(250, 64, generator=torch.Generator().manual_seed(bits))
    expected = literal(x, bits, smallest=version == "0.5")
    assert differing(ours(x, f"e8:K{bits}V{bits}@v={version}"), expected) <= 1 / 250


def test_ties_and_the_largest_coordinate() -> None:
    """The vector's largest coordinate lies exactly on a clamp bound: every convention shows."""
    generator = torch.Generator().manual_seed(3)
    for version in ("0.6", "0.5"):
        # Multiples of 1/8 with maximum 2 survive the rotation of 8 exactly (up to a common scale).
        y = torch.randint(-16, 17, (600, 8), generator=generator) / 8
        y[:, 0] = 2 * (1 - 2 * (torch.arange(600) % 2))
        h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        h8 = torch.kron(h2, torch.kron(h2, h2))
        scale = 8**-0.5
        x = y @ h8 * scale
        smallest = version == "0.5"
        expected = [literal_group(row, 4, smallest) for row in y.tolist()]
        got = ours(x, f"e8:K2V2@v={version}") @ h8 * scale
        # Exact ties between candidates are decided by the rounding of x: most rows have none.
        rows = ((got - torch.tensor(expected)).abs().amax(1) < 1e-4).float().mean().item()
        assert rows > 0.5


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_equals_the_published_program(bits: int, dim: int) -> None:
    """nexusquant-kv 0.6.3 itself: its Hadamard matrix and its quantizer, 32,768 vectors."""
    published = pytest.importorskip("nexusquant.core.e8_lattice")
    hadamard = pytest.importorskip("nexusquant.core.hadamard").hadamard_matrix(dim)
    x = torch.randn(32768, dim, generator=torch.Generator().manual_seed(dim + bits))
    rotated = published.E8Lattice.quantize_perhead(x @ hadamard, levels=2**bits)
    expected = rotated @ hadamard.T
    assert differing(ours(x, f"e8:K{bits}V{bits}"), expected) < LIMIT_OF_FLIPS


@pytest.mark.parametrize(("key_bits", "value_bits"), [(3, 2), (4, 2)])
def test_equals_the_published_cache_compression(key_bits: int, value_bits: int) -> None:
    """The published entry point on a transformers cache of rotated keys, within its fp16."""
    nexusquant = pytest.importorskip("nexusquant")
    rope = pytest.importorskip("nexusquant.core.rope_utils")
    cache_utils = pytest.importorskip("transformers.cache_utils")
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(1, 2, 300, 64, generator=generator)
    values = torch.randn(1, 2, 300, 64, generator=generator)
    rotated = rope.forward_rope(keys[0], base=1e6)[None]
    cache = cache_utils.DynamicCache()
    cache.update(rotated.clone(), values.clone(), 0)
    nexusquant.compress_kv_cache(
        cache, mode="quant_only", rope_base=1e6, key_bits=key_bits, value_bits=value_bits
    )
    our_keys = ours(keys.reshape(-1, 64), f"e8:K{key_bits}V{value_bits}").view(2, 300, 64)
    our_keys = rope.forward_rope(our_keys, base=1e6)
    our_values = ours(values.reshape(-1, 64), f"e8:K{value_bits}V{value_bits}").view(2, 300, 64)
    for found, expected in ((our_keys, cache.layers[0].keys), (our_values, cache.layers[0].values)):
        wrong = (found - expected[0].float()).abs().amax(-1) > 4e-3
        assert wrong.float().mean().item() <= 2 / 600
