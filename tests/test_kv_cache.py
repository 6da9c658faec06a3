"""Sinks, windows, protected layers, sharing and measured size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layersweep.kv import Stream, parse
from layersweep.kv.cache import CachedStream, Shared, bits_per_element, store
from layersweep.kv.growing import GrowingStream

KEY = Stream("k", 2, 64, "key", rope=True)
VALUE = Stream("v", 2, 64, "value", rope=False)
POSITIONS = torch.arange(50).expand(3, -1)


def some_x(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, 50, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def put(arm: str, x: Tensor, stream: Stream, shared: Shared, layer: int = 3) -> CachedStream:
    return store(parse(arm), x, stream, POSITIONS, layer, 8, shared)


def coded(arm: str, x: Tensor) -> Tensor:
    codec = parse(arm).codec
    assert codec is not None
    return codec.decode(codec.encode(x, KEY, POSITIONS), POSITIONS).to(x.dtype)


@pytest.mark.parametrize(
    ("arm", "layer"), [("exact", 3), ("lloyd:K3V2@pb=2", 1), ("lloyd:K3V2@pb=2", 6)]
)
def test_exact_layers_hand_back_the_very_tensor(arm: str, layer: int) -> None:
    x = some_x()
    cached = put(arm, x, KEY, Shared(), layer)
    assert cached.decoded() is x
    assert cached.nbits == 16 * x.numel()
    assert cached.nbytes == 2 * x.numel()


def test_sixteen_bits_keep_one_stream_exact() -> None:
    x = some_x()
    assert put("lloyd:K16V2", x, KEY, Shared()).decoded() is x
    assert torch.equal(put("lloyd:K16V2", x, VALUE, Shared()).decoded(), coded("lloyd:K2V2", x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sink_and_window(dtype: torch.dtype) -> None:
    x = some_x(dtype=dtype)
    decoded = put("lloyd:K3V2@sink=4@window=10", x, KEY, Shared()).decoded()
    assert decoded.dtype == dtype
    assert torch.equal(decoded[:, :, :4], x[:, :, :4])
    assert torch.equal(decoded[:, :, 40:], x[:, :, 40:])
    assert torch.equal(decoded[:, :, 4:40], coded("lloyd:K3V2", x)[:, :, 4:40])
    assert not torch.equal(decoded[:, :, 4:40], x[:, :, 4:40])


@pytest.mark.parametrize(
    "arm", ["lloyd:K3V2@window=50", "lloyd:K3V2@sink=30@window=20", "lloyd:K3V2@sink=999"]
)
def test_a_window_over_everything_is_exact(arm: str) -> None:
    x = some_x()
    assert put(arm, x, KEY, Shared()).decoded() is x


def test_measured_bits() -> None:
    x = some_x()
    lloyd = put("lloyd:K3V2", x, KEY, Shared())
    assert lloyd.nbits == 3 * 2 * 50 * (64 * 3 + 16)
    assert lloyd.elements == x.numel() == 19_200
    assert bits_per_element(lloyd.nbits, lloyd.elements) == 3.25
    both = [lloyd, put("lloyd:K3V2", x, VALUE, Shared())]
    assert bits_per_element(sum(c.nbits for c in both), sum(c.elements for c in both)) == 2.75
    window = put("lloyd:K3V2@sink=4@window=10", x, KEY, Shared())
    assert window.elements == x.numel()
    expected = (14 * 16 + 36 * 3.25) / 50
    assert bits_per_element(window.nbits, window.elements) == pytest.approx(expected)
    e8 = put("e8:K3V2", x, KEY, Shared())
    assert bits_per_element(e8.nbits, e8.elements) == pytest.approx(3.274 + 0.125, abs=2e-3)
    identity = put("identity", x, KEY, Shared())
    assert bits_per_element(identity.nbits, identity.elements) == 16


def test_what_two_arms_encode_alike_is_encoded_and_decoded_once() -> None:
    keys, values = some_x(0), some_x(1)
    shared = Shared()
    stored = {}
    for arm in (
        "lloyd:K3V2",
        "lloyd:K4V2",
        "lloyd:K3V3",
        "lloyd:K3V2@pb=1",
        "e8:K3V2",
        "lloyd:K3V2@window=10",
    ):
        stored[arm] = put(arm, keys, KEY, shared), put(arm, values, VALUE, shared)
    # keys 3 and 4, values 2 and 3; e8 both; both once more for the shorter range
    assert len(shared.encoded) == 4 + 2 + 2
    assert stored["lloyd:K3V2"][1].decoded() is stored["lloyd:K4V2"][1].decoded()
    assert stored["lloyd:K3V2"][0].decoded() is stored["lloyd:K3V3"][0].decoded()
    # the same method and bits on another stream are another encoding
    assert torch.equal(stored["lloyd:K3V3"][0].decoded(), coded("lloyd:K3V3", keys))
    assert torch.equal(stored["lloyd:K3V3"][1].decoded(), coded("lloyd:K3V3", values))


def test_what_two_arms_encode_is_prepared_once() -> None:
    shared, seen = Shared(), []
    for arm in ("trellis:K3V2", "trellis:K4V2", "trellis:K4V2@sink=4", "lloyd:K4V2@sink=4"):
        put(arm, some_x(), KEY, shared)
        seen.append(shared.prepared[KEY.name])
    assert seen[0] is seen[1]
    # another range, and then no level with the mean
    assert len({id(prepared) for prepared in seen}) == 3


@pytest.mark.parametrize("mean_tokens", [None, 16])
def test_means_and_levels_come_from_what_is_coded(mean_tokens: int | None) -> None:
    """A sink is an outlier: with it in the mean, every other value is off by the mean's error."""
    plain, sink = some_x(), some_x()
    sink[:, :, :4] *= 100
    arm, shared = parse("K3V2"), [Shared(), Shared()]
    stored = [
        store(arm, x, VALUE, POSITIONS, 3, 8, own, mean_tokens)
        for x, own in zip((plain, sink), shared, strict=True)
    ]
    assert torch.equal(stored[1].decoded()[:, :, :4], sink[:, :, :4])
    assert torch.equal(stored[0].decoded()[:, :, 4:], stored[1].decoded()[:, :, 4:])
    grown = [GrowingStream(arm, VALUE, 3, 8), GrowingStream(arm, VALUE, 3, 8)]
    for stream, x in zip(grown, (plain, sink), strict=True):
        for start, stop in ((0, 3), (3, 7), (7, 50)):  # the sink fills over two calls
            stream.append(x[:, :, start:stop])
    decoded = [stream.decoded(torch.float32) for stream in grown]
    assert torch.equal(decoded[1][:, :, :4], sink[:, :, :4])
    assert torch.equal(decoded[0][:, :, 4:], decoded[1][:, :, 4:])


@pytest.mark.parametrize(
    "arm", ["lloyd:K3V2", "e8:K4V2", "identity:lloyd", "lloyd:K3V2@sink=4@window=10"]
)
def test_arms_beside_it_change_nothing(arm: str) -> None:
    x = some_x()
    alone = put(arm, x, KEY, Shared())
    shared = Shared()
    for other in ("e8:K4V2", "lloyd:K4V2", "lloyd:K3V3"):
        put(other, x, KEY, shared).decoded()
    beside = put(arm, x, KEY, shared)
    assert torch.equal(alone.decoded(), beside.decoded())
    assert alone.nbits == beside.nbits
