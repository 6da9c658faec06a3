"""`bench codec`: what each KV codec loses at the bits that it really stores, and how fast it is.

Three measurements of every method at every number of bits:
- mse: of decoded unit Gaussian head vectors, relative to their energy; `mse_before_gain` is the
  smallest that one common factor reaches, as rate-distortion tables state it;
- key_kl: mean KL(exact || coded), nats, of attention over 4096 keys, 4 of whose channels stand out
  by 8 standard deviations, with RoPE (theta 1e6), for later queries;
- vectors per second, encoding and decoding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layersweep.families.spec import Rope
from layersweep.kv.arms import Arm
from layersweep.kv.codec import Packed
from layersweep.kv.means import mean_for
from layersweep.kv.stored import StoredStream
from layersweep.kv.stream import Stream
from layersweep.model import maths
from layersweep.model.rope import rope_table

Json = dict[str, Any]
KEY_TOKENS, QUERIES, OUTLIERS, OUTLIER_SIZE, THETA = 4096, 256, 4, 8.0, 1e6
HEADS = 4


@dataclass(frozen=True)
class Bench:
    """`vectors` of `dim` per method; everything is drawn from `seed`."""

    dim: int = 128
    vectors: int = 16_384
    seed: int = 0
    place: str = "cpu"

    @property
    def device(self) -> torch.device:
        return torch.device(self.place)

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + seed)
        return torch.randn(shape, generator=generator).to(self.device)

    def stream(self, role: str) -> Stream:
        is_key = role == "key"
        return Stream(role, HEADS, self.dim, role="key" if is_key else "value", rope=is_key)

    def positions(self, tokens: int) -> Tensor:
        return torch.arange(tokens, device=self.device)[None]


def bench_codecs(arms: Sequence[Arm], bench: Bench, say: Callable[[str], None]) -> list[Json]:
    """One row per arm with a codec; its key bits are what is measured."""
    rows = []
    for arm in arms:
        say(arm.name)
        if arm.codec is None:
            continue
        rows.append({
            "job": arm.name,
            "simulated": arm.simulated,
            "encoder": arm.encoder_on(bench.device),
            **distortion(arm, bench),
            "key_kl": key_divergence(arm, bench),
            **speeds(arm, bench),
        })  # fmt: skip
    return rows


def encode(arm: Arm, x: Tensor, stream: Stream, positions: Tensor) -> Packed:
    """As the cache does it: with a channel mean where the codec wants one."""
    assert arm.codec is not None
    return arm.codec.encode(x, stream, positions, mean_for(arm.codec, x))


def distortion(arm: Arm, bench: Bench) -> Json:
    """Bits from the packed bytes (None where the codec does not say), and the error of decoded
    vectors over their energy."""
    tokens = bench.vectors // HEADS
    x, stream, at = (
        bench.normal(1, HEADS, tokens, bench.dim),
        bench.stream("key"),
        bench.positions(tokens),
    )
    packed = encode(arm, x, stream, at)
    decoded = arm.decode(packed, at).double()
    x = x.double()
    dot, total = (x * decoded).sum(-1), x.square().sum(-1)
    best = decoded * (dot.sum() / decoded.square().sum())
    nbytes = arm.nbytes(packed)
    return {
        "bits_per_element": None if math.isnan(nbytes) else 8 * nbytes / x.numel(),
        "mse": ((x - decoded).square().sum() / total.sum()).item(),
        "mse_before_gain": ((x - best).square().sum() / total.sum()).item(),
        "gain": (dot / total).mean().item(),
    }


def key_divergence(arm: Arm, bench: Bench) -> float:
    """Mean KL of attention weights over keys with outlier channels, coded before RoPE."""
    keys = bench.normal(1, HEADS, KEY_TOKENS, bench.dim, seed=1)
    keys[..., :OUTLIERS] += OUTLIER_SIZE
    stored = StoredStream.empty(arm, bench.stream("key")).appended(keys)
    queries = bench.normal(1, HEADS, QUERIES, bench.dim, seed=2)
    everywhere = bench.positions(KEY_TOKENS + QUERIES)[0]
    cos, sin = rope_table(Rope(THETA, bench.dim), everywhere, len(everywhere))
    q = maths.rope(queries, cos[KEY_TOKENS:], sin[KEY_TOKENS:])

    def weights(k: Tensor) -> Tensor:
        turned = maths.rope(k.float(), cos[:KEY_TOKENS], sin[:KEY_TOKENS])
        logits: Tensor = q @ turned.transpose(-1, -2) / bench.dim**0.5
        return logits.double().log_softmax(-1)

    exact, coded = weights(keys), weights(stored.decoded())
    return (exact.exp() * (exact - coded)).sum(-1).mean().item()


def speeds(arm: Arm, bench: Bench) -> Json:
    """Vectors per second, best of three after one that warms up."""
    tokens = bench.vectors // HEADS
    x, stream, at = (
        bench.normal(1, HEADS, tokens, bench.dim, seed=3),
        bench.stream("key"),
        bench.positions(tokens),
    )
    packed = encode(arm, x, stream, at)
    return {
        "encode_vectors_per_s": bench.vectors / _best(lambda: encode(arm, x, stream, at), bench),
        "decode_vectors_per_s": bench.vectors / _best(lambda: arm.decode(packed, at), bench),
    }


def _best(work: Callable[[], object], bench: Bench) -> float:
    times = []
    for _ in range(3):
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        started = time.perf_counter()
        work()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        times.append(time.perf_counter() - started)
    return min(times)
