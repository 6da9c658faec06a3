"""Stored streams: sinks, windows, protected layers, growth, sharing, size, and moving them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layersweep.kv import parse
from layersweep.kv.codec import role_bits, wants_mean
from layersweep.kv.methods import FIRST_BLOCK
from layersweep.kv.shared import Shared
from layersweep.kv.size import kv_size
from layersweep.kv.store import KvStore, Waiting
from layersweep.kv.stored import StoredStream
from layersweep.kv.stream import keys_and_values

KEY, VALUE = keys_and_values(2, 64)
POSITIONS = torch.arange(50).expand(3, -1)
GROWING = ["exact", "lloyd:K3V2", "lloyd:K3V2@sink=4@window=10", "kivi:K3V2@window=3", "int4@pb=1",
           "trellis:K3V2", "trellis:K3V2@sink=4@window=10", "e8:K4V2@sink=3", "fp8@window=33",
           "lloyd:K16V2", "identity:lloyd", "trellis:K3V2@found=1", "lloyd:K3V2@fine=9",
           "trellis:K2V2@found=1@window=3@fine=20@sink=2"]  # fmt: skip


def some_x(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, 50, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(arm: str, x: Tensor, stream: object = KEY, layer: int = 3) -> StoredStream:
    return StoredStream.empty(parse(arm), stream, layer, 8).appended(x)  # type: ignore[arg-type]


def store_of(arms: list[str], mean_tokens: int | None = None) -> KvStore:
    streams = [(parse(arm), (KEY, VALUE)) for arm in arms]
    return KvStore.empty(streams, 3, 8, mean_tokens)


def coded(arm: str, x: Tensor) -> Tensor:
    codec = parse(arm).codec
    assert codec is not None
    return codec.decode(codec.encode(x, KEY, POSITIONS), POSITIONS).to(x.dtype)


# --- one stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "layer"),
    [("exact", 3), ("lloyd:K3V2@pb=2", 1), ("lloyd:K3V2@pb=2", 6), ("lloyd:K3V2@layers=4-7", 3)],
)
def test_exact_layers_hand_back_the_very_tensor(arm: str, layer: int) -> None:
    x = some_x()
    stream = stored(arm, x, layer=layer)
    assert stream.decoded() is x
    assert stream.nbits == 16 * x.numel()


def test_sixteen_bits_keep_one_stream_exact() -> None:
    x = some_x()
    assert stored("lloyd:K16V2", x).decoded() is x
    assert torch.equal(stored("lloyd:K16V2", x, VALUE).decoded(), coded("lloyd:K2V2", x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sink_and_window(dtype: torch.dtype) -> None:
    x = some_x(dtype=dtype)
    decoded = stored("lloyd:K3V2@sink=4@window=10", x).decoded()
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
    assert stored(arm, x).decoded() is x


def test_measured_bits() -> None:
    def bits(arm: str) -> float:
        stream = stored(arm, some_x())
        assert stream.elements == 3 * 2 * 50 * 64
        return stream.nbits / stream.elements

    assert stored("lloyd:K3V2", some_x()).nbits == 3 * 2 * 50 * (64 * 3 + 16)
    assert bits("lloyd:K3V2") == 3.25
    assert bits("lloyd:K3V2@sink=4@window=10") == pytest.approx((14 * 16 + 36 * 3.25) / 50)
    assert bits("e8:K3V2") == pytest.approx(3.274 + 0.125, abs=2e-3)
    assert bits("identity") == 16
    both = store_of(["lloyd:K3V2"]).appended((some_x(0), some_x(1)))
    assert both.nbits(0) / both.elements(0) == 2.75


@settings(deadline=None, max_examples=60)
@given(
    arm=st.sampled_from(GROWING),
    stream=st.sampled_from([KEY, VALUE]),
    cuts=st.lists(st.integers(1, 49), max_size=5, unique=True),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_appended_in_any_pieces_is_appended_at_once(
    arm: str, stream: object, cuts: list[int], dtype: torch.dtype
) -> None:
    """Bit for bit; and every token is encoded once, so sizes add up. A channel mean is that of the
    first tokens that are encoded: there, the first piece has them."""
    x, own = some_x(dtype=dtype), parse(arm)
    mean = own.codec is not None and wants_mean(own.codec)
    first = own.sink + own.window + 8 if mean else 0
    grown = StoredStream.empty(own, stream, 3, 8, 8 if mean else None)  # type: ignore[arg-type]
    whole = grown.appended(x)
    ends = [end for end in sorted(cuts) if end >= first] + [50]
    for start, stop in zip([0, *ends], ends, strict=False):
        grown = grown.appended(x[:, :, start:stop])
        assert (grown.tokens, grown.elements) == (stop, 3 * 2 * stop * 64)
        assert torch.equal(grown.decoded()[:, :, : own.sink], x[:, :, : min(own.sink, stop)])
        newest = max(own.sink, stop - own.window)
        assert torch.equal(grown.decoded()[:, :, newest:], x[:, :, newest:stop])
    assert torch.equal(grown.decoded(), whole.decoded())
    assert grown.nbits == whole.nbits
    assert grown.held_bytes == whole.held_bytes


def test_every_token_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = parse("lloyd:K3V2@window=5@sink=2")
    encoded, codec = [], type(arm.codec)
    original = codec.encode_all

    def spy(self, x, *rest):  # type: ignore[no-untyped-def]
        encoded.append(x.shape[2])
        return original(self, x, *rest)

    monkeypatch.setattr(codec, "encode_all", spy)
    x, stream = some_x(), StoredStream.empty(arm, KEY, 1, 4)
    for start, stop in ((0, 1), (1, 4), (4, 20), (20, 21), (21, 40)):
        stream = stream.appended(x[:, :, start:stop])
    assert encoded == [20 - 2 - 5, 1, 19]
    assert stream.nbits == 3 * 2 * (7 * 64 * 16 + 33 * (64 * 3 + 16))


@pytest.mark.parametrize("mean_tokens", [None, 16])
def test_means_and_levels_come_from_what_is_coded(mean_tokens: int | None) -> None:
    """A sink is an outlier: with it in the mean, every other value is off by the mean's error."""
    plain, sink = some_x(), some_x()
    sink[:, :, :4] *= 100
    empty = StoredStream.empty(parse("trellis:K3V2@sink=4"), VALUE, 3, 8, mean_tokens)
    for pieces in ((50,), (3, 7, 50)):  # at once, and a sink that fills over two calls
        both = []
        for x in (plain, sink):
            stream, start = empty, 0
            for stop in pieces:
                stream, start = stream.appended(x[:, :, start:stop]), stop
            both.append(stream.decoded())
        assert torch.equal(both[1][:, :, :4], sink[:, :, :4])
        assert torch.equal(both[0][:, :, 4:], both[1][:, :, 4:])


# --- growing caches ------------------------------------------------------------------------------

BLOCKS = parse("trellis:K3V2@found=1@window=8@block=16@fine=40")


def long_x(tokens: int = 230, seed: int = 0) -> Tensor:
    """A stream around a mean, with a sink at its start and another at 150."""
    x = torch.randn(2, 2, tokens, 64, generator=torch.Generator().manual_seed(seed)) + 2
    x[:, :, [0, 150]] = x[:, :, [0, 150]] * 0.02 + torch.linspace(-0.5, 0.5, 64)
    return x


@settings(deadline=None, max_examples=8)
@given(stream=st.sampled_from([KEY, VALUE]),
       cuts=st.lists(st.integers(1, 229), max_size=6, unique=True))  # fmt: skip
def test_blocks_do_not_show_how_a_cache_has_grown(stream: object, cuts: list[int]) -> None:
    """Means included: nothing is coded before the tokens that they come from are there."""
    x = long_x()
    empty = StoredStream.empty(BLOCKS, stream, 3, 8, FIRST_BLOCK)  # type: ignore[arg-type]
    whole = grown = empty
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 230], strict=True):
        grown = grown.appended(x[:, :, start:stop])
    whole = whole.appended(x)
    assert torch.equal(grown.decoded(), whole.decoded())
    assert (grown.nbits, grown.held_bytes) == (whole.nbits, whole.held_bytes)
    # 230 - 1 - 8 tokens have left, of which 208 are whole blocks
    codec = 208 * (64 * stream.dim // 64 * role_bits(BLOCKS.codec, stream) + 8) + 65 * 16  # type: ignore
    fine = 40 * (64 * 2 + 8) + 65 * 16
    found = 64 * 16  # the first token; beside it a bit for each token
    assert whole.nbits == 2 * (2 * (codec + fine + found + 22 * 64 * 16) + 208)
    size = kv_size(BLOCKS, [(stream, stream)], 230)  # type: ignore[list-item]
    assert 8 * size.nbytes == whole.nbits


def test_what_is_fine_is_near_and_leaves_the_rest_as_it_is() -> None:
    x = long_x()
    plain, fine = (
        StoredStream.empty(arm, VALUE, 3, 8, FIRST_BLOCK).appended(x).decoded()
        for arm in (replace(BLOCKS, fine=0), BLOCKS)
    )
    assert torch.equal(plain[:, :, : 209 - 40], fine[:, :, : 209 - 40])
    assert torch.equal(fine[:, :, 209:], x[:, :, 209:])
    newest = slice(209 - 40, 209)
    before, after = ((y - x)[:, :, newest].square().mean() for y in (plain, fine))
    assert after < 0.15 * before  # 2 bits more: a tenth


def test_found_sinks_are_coded_around_the_first_token() -> None:
    x = long_x()
    plain, found = (
        stored(f"trellis:K2V2{option}@sink=1", x, VALUE).decoded() for option in ("", "@found=1")
    )
    before, after = ((y - x)[:, :, 150].square().mean() for y in (plain, found))
    assert before > 0.1
    assert after < 1e-4
    others = torch.arange(230) != 150
    assert torch.equal(plain[:, :, others], found[:, :, others])


# --- several arms --------------------------------------------------------------------------------


def test_what_two_arms_encode_alike_is_encoded_and_decoded_once() -> None:
    keys, values = some_x(0), some_x(1)
    arms = ["lloyd:K3V2", "lloyd:K4V2", "lloyd:K3V3", "lloyd:K3V2@pb=1", "e8:K3V2",
            "lloyd:K3V2@window=10"]  # fmt: skip
    store = store_of(arms).appended((keys, values))
    # keys 3 and 4, values 2 and 3; e8 both; both once more for the shorter range
    assert len({stream.middle for streams in store.arms for stream in streams}) == 4 + 2 + 2
    read = [store.decoded(arm) for arm in range(len(arms))]
    assert read[0][1] is read[1][1]
    assert read[0][0] is read[2][0]
    # the same method and bits on another stream are another encoding
    assert torch.equal(read[2][0], coded("lloyd:K3V3", keys))
    assert torch.equal(read[2][1], coded("lloyd:K3V3", values))
    grown = store.appended((keys[:, :, :3], values[:, :, :3]))
    assert len({stream.middle for streams in grown.arms for stream in streams}) == 4 + 2 + 2


def test_what_two_arms_encode_is_prepared_once() -> None:
    shared, seen = Shared(), []
    for arm in ("trellis:K3V2", "trellis:K4V2", "trellis:K4V2@sink=4", "lloyd:K4V2@sink=4"):
        StoredStream.empty(parse(arm), KEY).appended(some_x(), shared)
        seen.append(shared.prepared[KEY.name])
    assert seen[0] is seen[1]
    # another range, and then no level with the mean
    assert len({id(prepared) for prepared in seen}) == 3


@pytest.mark.parametrize(
    "arm", ["lloyd:K3V2", "e8:K4V2", "identity:lloyd", "lloyd:K3V2@sink=4@window=10"]
)
def test_arms_beside_it_change_nothing(arm: str) -> None:
    x, others = (some_x(0), some_x(1)), ["e8:K4V2", "lloyd:K4V2", "lloyd:K3V3"]
    alone, beside = store_of([arm]).appended(x), store_of([*others, arm]).appended(x)
    for one, other in zip(alone.decoded(0), beside.decoded(3), strict=True):
        assert torch.equal(one, other)
    assert alone.nbits(0) == beside.nbits(3)


@settings(deadline=None, max_examples=20)
@given(
    arms=st.lists(st.sampled_from(GROWING), min_size=1, max_size=4),
    room=st.sampled_from([0, 3000, 2**24]),
    tokens=st.integers(1, 50),
)
def test_moved_decodes_alike_and_grows_alike(arms: list[str], room: int, tokens: int) -> None:
    x, later = (some_x(0)[:, :, :tokens], some_x(1)[:, :, :tokens]), (some_x(2), some_x(3))
    store, waiting = store_of(arms).appended(x), Waiting(torch.full((room,), 255).byte())
    away = store.moved(torch.clone).moved(waiting.put)
    back = away.moved(partial(waiting.on, torch.device("cpu")))
    assert waiting.moved_bytes == 0  # nothing has left the host
    for one, other in ((store, back), (store.appended(later), back.appended(later))):
        for arm in range(len(arms)):
            pairs = zip(one.decoded(arm), other.decoded(arm), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert one.nbits(arm) == other.nbits(arm)
    some = store.moved(torch.clone, slice(len(arms) - 1, None))
    assert len(some.arms) == 1
    assert torch.equal(some.decoded(0)[0], store.decoded(len(arms) - 1)[0])


@settings(deadline=None, max_examples=20)
@given(
    arms=st.lists(st.sampled_from(["exact", "lloyd:K3V2", "lloyd:K4V2", "trellis:K3V2@sink=4",
                                   "trellis:K3V2@found=1", "int4", "e8:K4V2@sink=3"]),
                  min_size=1, max_size=4),
    lengths=st.lists(st.integers(5, 40), min_size=1, max_size=4),
)  # fmt: skip
def test_joined_decodes_alike_and_shares_alike(arms: list[str], lengths: list[int]) -> None:
    stores = [
        store_of(arms).appended((some_x(2 * at)[:, :, :count], some_x(2 * at + 1)[:, :, :count]))
        for at, count in enumerate(lengths)
    ]
    together = KvStore.joined(stores)
    assert together is not None
    middles = [[s.middle for pair in store.arms for s in pair] for store in (stores[0], together)]
    assert len(set(middles[0])) == len(set(middles[1]))
    for arm in range(len(arms)):
        for at, (store, count) in enumerate(zip(stores, lengths, strict=True)):
            pairs = zip(together.decoded(arm), store.decoded(arm), strict=True)
            assert all(torch.equal(a[3 * at : 3 * at + 3, :, :count], b) for a, b in pairs)
            assert together.decoded(arm)[0].isfinite().all()


@pytest.mark.parametrize(
    "arm", ["lloyd:K3V2@window=3", "kivi:K3V2", "lloyd:K3V2@sink=30", "lloyd:K3V2@fine=5"]
)
def test_what_cannot_be_padded_is_not_joined(arm: str) -> None:
    """Exact tokens at the end, a packed form of its own, a prefix that is all sink, and what is
    added to the last tokens."""
    stores = [
        store_of([arm]).appended((some_x()[:, :, :count], some_x()[:, :, :count]))
        for count in (40, 25)
    ]
    assert KvStore.joined(stores) is None
