"""What layers keep: streams of unequal shapes, latents, windows, states; and their size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_kv_codecs import gaussians
from torch import Tensor

from layersweep.errors import InputError
from layersweep.kv import Stream, parse, parse_arms
from layersweep.kv.check import check
from layersweep.kv.codec import check_stream, role_bits
from layersweep.kv.size import kv_size
from layersweep.kv.store import KvStore
from layersweep.kv.stored import StoredStream
from layersweep.kv.stream import State, keys_and_values, latent_streams

CPU = torch.device("cpu")
ALL = parse_arms("all,trellis:K1V1,identity")
# Head sizes that a method of `all` cannot take, by the numbers that it groups.
TOO_SHORT = {"int4": 64, "int2": 64, "q8_0": 32, "q5_0": 32, "q4_0": 32, "kivi": 32}
DIMS = [64, 80, 96, 112, 128, 192, 256, 512]
# Keys of unequal size, a latent, a window: what transformers' families keep.
LAYERS = {
    "unequal": keys_and_values(2, 192, value_dim=128),
    "latent": latent_streams(512, 64),
    "window": keys_and_values(2, 64, window=16),
}
ARMS = ["exact", "trellis:K3V2@sink=4", "trellis:K3V2@found=1", "lloyd:K3V2@fine=6",
        "e8:K4V2", "lloyd:K3V2@window=10", "turbo:K3V2",
        "voronoi:K3V2", "kivi:K3V2@sink=3", "int4", "q8_0", "fp8", "lloyd:K16V2",
        "identity:trellis", "trellis:K3V2@pb=1"]  # fmt: skip


def tensors(streams: tuple[Stream, ...], tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(
        gaussians(2, stream.heads, tokens, stream.dim, seed=seed + at)
        for at, stream in enumerate(streams)
    )


# --- declarations --------------------------------------------------------------------------------


def test_streams_of_attention_and_of_a_latent() -> None:
    keys, values = keys_and_values(8, 192, window=128, value_dim=96)
    assert (keys.heads, keys.dim, keys.role, keys.rope, keys.window) == (8, 192, "key", True, 128)
    assert (values.dim, values.role, values.rope, values.window) == (96, "value", False, 128)
    latent, rotary = latent_streams(512, 64)
    assert (latent.heads, latent.dim, latent.role, latent.rope) == (1, 512, "latent", False)
    assert (rotary.heads, rotary.dim, rotary.role, rotary.rope) == (1, 64, "key", True)
    codec = parse("lloyd:K3V2").codec
    assert codec is not None
    assert [role_bits(codec, stream) for stream in (keys, values, latent, rotary)] == [3, 2, 3, 3]


@pytest.mark.parametrize(
    ("window", "tokens", "first"),
    [(None, 50, 0), (16, 50, 35), (16, 16, 1), (16, 15, 0), (1, 9, 9)],
)
def test_a_window_needs_its_last_tokens_but_one(
    window: int | None, tokens: int, first: int
) -> None:
    assert keys_and_values(1, 8, window)[0].first_held(tokens) == first


# --- head sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["key", "value", "latent"])
@pytest.mark.parametrize("dim", DIMS)
def test_every_method_takes_a_head_size_or_names_it(dim: int, role: str) -> None:
    """Powers of two and sums of them. A group that does not divide the size is the one reason."""
    stream = Stream("some", 2, dim, role=role, rope=False)  # type: ignore[arg-type]
    x = gaussians(1, 2, 3, dim)
    for arm in ALL:
        group = TOO_SHORT.get(arm.method, 8)
        if arm.method == "kivi" and role != "value":
            group = 8
        if dim % group:
            with pytest.raises(InputError, match=f"'some' has head size {dim}, needed a multiple"):
                check_stream(arm.codec, stream, CPU, torch.float32)  # type: ignore[arg-type]
            continue
        check_stream(arm.codec, stream, CPU, torch.float32)  # type: ignore[arg-type]
        stored = StoredStream.empty(replace(arm, sink=0), stream).appended(x)
        error = (stored.decoded() - x).square().mean().item()
        assert error < (0.5 if arm.key_bits == 1 else 0.25), arm.name
        assert stored.nbits / stored.elements < 16.001


def test_ones_own_codec_that_knows_no_latent_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n"
        "    def __init__(self, key_bits, value_bits): self.bits = {'key': 3, 'value': 2}\n"
        "    def encode(self, x, stream, positions, mean=None): self.bits[stream.role]; return x\n"
        "    def decode(self, packed, positions): return packed.float()\n"
    )
    codec = parse(f"{file}:Mine:K3V2").codec
    assert codec is not None
    latent, rotary = latent_streams(512, 64)
    check_stream(codec, rotary, CPU, torch.float32)
    with pytest.raises(InputError, match=r"KeyError: 'latent'.*'latent' of role latent.* 512"):
        check_stream(codec, latent, CPU, torch.float32)
    verdict = check(codec)[-1]
    assert verdict.kept is None
    assert "KeyError: 'latent': no models with MLA" in verdict.detail


# --- layers of unequal streams -------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ARMS)
def test_a_store_of_any_streams_counts_its_true_elements(name: str, layer: str) -> None:
    streams = LAYERS[layer]
    x, later = tensors(streams, 40), tensors(streams, 3, seed=7)
    store = KvStore.empty([(parse(name), streams)], 1, 4).appended(x).appended(later)
    per_token = sum(stream.heads * stream.dim for stream in streams)
    assert store.elements(0) == 2 * 43 * per_token
    for one, new, own, stream in zip(store.decoded(0), later, x, streams, strict=True):
        assert one.shape == (2, stream.heads, 43, stream.dim)
        error = (one - torch.cat((own, new), dim=2)).square().mean().item()
        assert error == 0 if name == "exact" else error < 0.25
    there = KvStore.joined([store, store])
    assert there is None or there.elements(0) == 2 * store.elements(0)
    if name == "lloyd:K16V2":  # a latent is key and value: it has the bits of keys
        coded = {"unequal": 128 * 2, "latent": 0, "window": 64 * 2}[layer]
        assert store.nbits(0) == 2 * 43 * (16 * (per_token - coded) + (coded and coded * 2 + 32))


# --- windows -------------------------------------------------------------------------------------


def windowed(name: str, window: int = 16, first: int = 0) -> KvStore:
    return KvStore.empty([(parse(name), keys_and_values(2, 64, window))], 3, 8, 8, first)


@pytest.mark.parametrize("name", ARMS)
def test_a_store_that_starts_late_is_one_whose_sink_is_gone(name: str) -> None:
    """Tokens 35 ... 49 of 50, as a sweep hands them over: nothing before them costs a bit."""
    x = tensors(keys_and_values(2, 64), 15)
    arm = replace(parse(name), sink=0)
    late = windowed(name, first=35).appended(x)
    plain = KvStore.empty([(arm, keys_and_values(2, 64))], 3, 8, 8).appended(x)
    assert (late.tokens, late.end) == (15, 50)
    assert late.nbits(0) == plain.nbits(0)
    assert late.elements(0) == 2 * 2 * 2 * 15 * 64
    assert all(torch.equal(a, b) for a, b in zip(late.decoded(0), plain.decoded(0), strict=True))


def test_a_sink_is_the_first_tokens_of_the_text() -> None:
    x = tensors(keys_and_values(2, 64), 15)
    store = windowed("lloyd:K3V2@sink=4", first=2).appended(x)
    assert torch.equal(store.decoded(0)[0][:, :, :2], x[0][:, :, :2])
    assert not torch.equal(store.decoded(0)[0][:, :, 2:4], x[0][:, :, 2:4])
    assert store.nbits(0) == 2 * 2 * (2 * 2 * 64 * 16 + 13 * (64 * 5 + 32))


@pytest.mark.parametrize("steps", [(50,), (20, 1, 1, 1, 13, 14), (3, 5, 30, 1, 1, 10), (40, 10)])
@pytest.mark.parametrize("name", [*ARMS, "lloyd:K3V2@window=20@sink=2", "kivi:K3V2@window=5"])
def test_a_window_that_moves_hides_and_frees_what_is_gone(
    name: str, steps: tuple[int, ...]
) -> None:
    """What is read is what a store of all tokens gives for those; what is stored is a window's."""
    x, start = tensors(keys_and_values(2, 64), 50), 0
    moving, everything = windowed(name), windowed(name)
    arm = parse(name)
    forgets = arm.window >= 15  # the middle is out of sight before it is read
    for count in steps:
        new = tuple(part[:, :, start : start + count] for part in x)
        start += count
        moving, everything = moving.appended(new), everything.appended(new)
        pairs = zip(moving.decoded(0), everything.decoded(0), strict=True)
        assert forgets or all(torch.equal(a, b[:, :, -a.shape[2] :]) for a, b in pairs)
        moving = moving.since(max(start - 15, 0))
        assert moving.tokens == min(start, 15)
        assert moving.end == start
        assert moving.elements(0) == 2 * 2 * 2 * 64 * min(start, 15)
        pairs = zip(moving.decoded(0), everything.decoded(0), strict=True)
        assert all(torch.equal(a, b[:, :, -a.shape[2] :]) for a, b in pairs)
    for middle in [stream.middle for stream in moving.arms[0] if stream.middle]:
        end, count = start - arm.window, middle.packed.tokens
        assert middle.positions.tolist() == [list(range(end - count, end))] * 2
    exact = arm.codec is None
    assert moving.nbits(0) <= 16 * moving.elements(0) * (1 if exact else 1.2)
    held = sum(stream.held_bytes for stream in moving.arms[0])
    assert held <= 4 * 2 * 2 * 2 * 64 * (15 + (31 if "kivi" in name else 0)) * 1.2


def test_arms_that_share_an_encoding_share_what_is_left_of_it() -> None:
    x = tensors(keys_and_values(2, 64), 50)
    streams = keys_and_values(2, 64, 16)
    arms = [(parse(name), streams) for name in ("lloyd:K3V2", "lloyd:K4V2")]
    store = KvStore.empty(arms, 3, 8).appended(x).since(35)
    assert store.arms[0][1].middle is store.arms[1][1].middle
    assert store.decoded(0)[1] is store.decoded(1)[1]
    assert store.since(35).arms == store.arms


def test_ones_own_codec_is_hidden_and_counted_by_its_share() -> None:
    own = Path(__file__).with_name("own_codec.py")
    x = tensors(keys_and_values(2, 64), 50)
    store = windowed(f"{own}:Rounded:K3V2").appended(x)
    late = store.since(35)
    assert late.tokens == 15
    assert late.nbits(0) == pytest.approx(store.nbits(0) * 15 / 50)
    assert torch.equal(late.decoded(0)[1], store.decoded(0)[1][:, :, 35:])
    grown = late.appended(tuple(part[:, :, :1] for part in x)).since(36)
    assert (grown.tokens, grown.end) == (15, 51)


def test_windows_of_prefixes_of_several_lengths_are_one_batch() -> None:
    """All of them hold 15 tokens, so nothing is padded; positions stay each one's own."""
    parts = [tensors(keys_and_values(2, 64), 15, seed) for seed in (0, 9)]
    stores = [
        windowed("lloyd:K3V2", first=first).appended(x)
        for first, x in zip((35, 85), parts, strict=True)
    ]
    together = KvStore.joined(stores)
    assert together is not None
    middle = together.arms[0][0].middle
    assert middle is not None
    assert middle.positions[:, 0].tolist() == [35, 35, 85, 85]
    for at, store in enumerate(stores):
        alone, both = store.decoded(0)[0], together.decoded(0)[0]
        assert torch.equal(both[2 * at : 2 * at + 2], alone)
    unlike = windowed("lloyd:K3V2@sink=36", first=35), windowed("lloyd:K3V2@sink=36", first=34)
    assert KvStore.joined([unlike[0].appended(parts[0]), unlike[1].appended(parts[1])]) is None


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "name",
    [
        *ARMS,
        "kivi:K2V2@residual=128@window=33",
        "kvarn:K4V2",
        "oscar:K2V2@window=64@sink=4",
        "trellis:K3V2@window=64@sink=4@layers=1-2",
    ],
)
@pytest.mark.parametrize("tokens", [1, 14, 300])
def test_size_by_arithmetic_is_the_size_that_is_measured(
    name: str, layer: str, tokens: int
) -> None:
    """Except that a window that has moved may lie across a group of keys."""
    streams = LAYERS[layer]
    first = streams[0].first_held(tokens)
    x = tuple(part[:1] for part in tensors(streams, tokens - first))
    stores = [
        KvStore.empty([(parse(name), streams)], at, 3, None, first).appended(x) for at in range(3)
    ]
    size = kv_size(parse(name), [streams] * 3, tokens)
    assert size.elements == sum(store.elements(0) for store in stores)
    measured = sum(store.nbits(0) for store in stores)
    assert 8 * size.nbytes == pytest.approx(measured, rel=3e-4)
    assert size.bits_per_element == pytest.approx(measured / size.elements, rel=3e-4)


def test_size_of_a_hybrid_at_4k_and_32k() -> None:
    """Three layers with a window of 1024 and a state, one with all tokens."""
    window, full = keys_and_values(4, 128, 1024), keys_and_values(4, 128)
    state = State("recurrent", 16 * 128 * 128, bits=32)
    layers = [window, (*window, state), window, full]
    arm = parse("lloyd:K3V2")
    vector = (128 * 3 + 16 + 128 * 2 + 16) / 8  # key and value
    for tokens in (4096, 32768):
        size = kv_size(arm, layers, tokens)
        assert size.nbytes == 4 * vector * (3 * 1023 + tokens)
        assert size.elements == 4 * 256 * (3 * 1023 + tokens)
        assert size.state_bytes == 16 * 128 * 128 * 4
        assert size.bits_per_element == 2.625
        assert size.bytes_per_token == (size.nbytes + size.state_bytes) / tokens
    latent = kv_size(parse("exact"), [latent_streams(512, 64)] * 27, 4096)
    assert latent.bytes_per_token == 27 * 576 * 2
    assert math.isnan(kv_size(arm, [[state]], 10).bits_per_element)
