"""Attention that reads codes against attention over what they decode to, emulated or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from kernel_checks import draw
from torch import Tensor

from layersweep.families.spec import Rope
from layersweep.kernels import Kernels
from layersweep.kv.arms import parse
from layersweep.kv.basis import Basis
from layersweep.kv.fit import Prediction
from layersweep.kv.packed_attention import Frame, PackedPast, Turn, attend_decoded, refusal
from layersweep.kv.store import KvStore
from layersweep.kv.stored import StoredStream
from layersweep.kv.stream import Stream, keys_and_values
from layersweep.model.rope import rope_table

ROPES = {
    "halves": (Rope(1e4, 0), False),
    "interleaved": (Rope(1e4, 0), True),
    "a half of the head": (Rope(1e6, -2), False),
}
CLOSE = 4e-3  # largest difference from float32, for values of about 1: operands are half numbers


@dataclass(frozen=True)
class Case:
    """Of `batch` sequences with keys of `groups` heads of `dim`, each for `ratio` query heads."""

    dim: int
    groups: int
    ratio: int
    batch: int = 2
    rope: str | None = "halves"

    @property
    def heads(self) -> int:
        return self.groups * self.ratio


def streams(case: Case, seed: int, device: torch.device) -> tuple[Stream, Stream]:
    """Keys in coordinates of their own, and values of which these tell a part."""
    groups, dim = case.groups, case.dim
    even = draw(seed, groups, 1, dim, device=device).sigmoid() + 0.5
    turn = torch.linalg.qr(draw(seed + 1, groups, dim, dim, device=device))[0]
    keys, values = keys_and_values(groups, dim)
    told = draw(seed + 2, groups * dim, groups * dim, device=device) / (groups * dim) ** 0.5
    basis = Basis((turn.mT / even).contiguous(), (even.mT * turn).contiguous())
    return replace(keys, basis=basis), replace(values, prediction=Prediction(0.7 * told))


def grown(
    arm: str, of: Sequence[Stream], case: Case, tokens: int, seed: int, dtype: torch.dtype,
    batch: int,
) -> tuple[StoredStream, ...]:  # fmt: skip
    """A cache of so many tokens, two of which look like the first."""
    device = of[0].basis.into.device if of[0].basis else torch.device("cpu")
    k, v = (draw(seed + i, batch, case.groups, tokens, case.dim, device=device) for i in range(2))
    k += 2 * draw(seed + 2, case.groups, 1, case.dim, device=device)
    prediction = of[1].prediction
    if prediction is not None:
        v += 0.5 * prediction.values(k)
    for at in (tokens // 3, tokens // 2):
        k[:, :, at], v[:, :, at] = 1.05 * k[:, :, 0], 0.9 * v[:, :, 0]
    store = KvStore.empty([(parse(arm, growing=True), of)], 0, 1, mean_tokens=128)
    return store.appended((k.to(dtype), v.to(dtype))).arms[0]


def turn_of(case: Case, positions: int, device: torch.device) -> Turn:
    if case.rope is None:
        return Turn.none(case.dim, positions, device)
    rope, interleaved = ROPES[case.rope]
    rope = replace(rope, dim=case.dim // 2 if rope.dim < 0 else case.dim)
    table = rope_table(rope, torch.arange(positions, device=device), positions)
    return Turn.of(*table, case.dim, interleaved)


def asked(case: Case, seed: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A query for each head and three exact tokens, as they come to attention."""
    sizes = ((case.heads,), (case.groups, 3), (case.groups, 3))
    found = [
        draw(seed + i, case.batch, *size, case.dim, device=device) for i, size in enumerate(sizes)
    ]
    return [(x / 2 if i == 0 else x).to(dtype) for i, x in enumerate(found)]


def check_packed(
    kernels: Kernels, device: torch.device, case: Case, arm: str, tokens: int, seed: int,
    *, softcap: float | None = None, sinks: bool = False, predicted: bool = True,
) -> None:  # fmt: skip
    dtype = kernels.dtype
    keys, values = streams(case, seed, device)
    of = keys, values if predicted else replace(values, prediction=None)
    kept_keys, kept_values = grown(arm, of, case, tokens, seed + 3, dtype, case.batch)
    assert refusal(kept_keys, kept_values) is None
    turn = turn_of(case, tokens + 3, device)
    q, *own = asked(case, seed + 6, dtype, device)
    rule = {"scale": case.dim**-0.5, "softcap": softcap}
    sink = draw(seed + 9, case.heads, device=device) if sinks else None
    own_tokens = torch.tensor([1 + i % 3 for i in range(case.batch)], device=device)
    past = PackedPast.of(kept_keys, kept_values, Frame.of(kept_keys, kept_values, turn))
    found = past.attend(
        kernels, q, (own[0], own[1]), scale=case.dim**-0.5, softcap=softcap, sinks_Q=sink,
        own_tokens_B=own_tokens,
    )  # fmt: skip
    wanted = attend_decoded(
        kept_keys, kept_values, turn, q, (own[0], own[1]), scale=case.dim**-0.5, softcap=softcap,
        sinks_Q=sink, own_tokens_B=own_tokens,
    )  # fmt: skip
    near(found, wanted, dtype, (seed, rule))


def check_lengths(kernels: Kernels, device: torch.device, case: Case, seed: int) -> None:
    """Sequences of other lengths, joined as a tile joins them: each as if it were alone."""
    of, dtype = streams(case, seed, device), kernels.dtype
    arm, tokens = "trellis:K3V2@found=1", [40 + 503 * i for i in range(case.batch)]
    alone = [grown(arm, of, case, n, seed + 3 * i, dtype, 1) for i, n in enumerate(tokens)]
    joined = [StoredStream.joined(one, {}) for one in zip(*alone, strict=True)]
    kept_keys, kept_values = joined
    assert kept_keys is not None and kept_values is not None
    turn, counts = turn_of(case, max(tokens), device), torch.tensor(tokens, device=device) - 1
    q, *own = asked(case, seed + 60, dtype, device)
    frame = Frame.of(kept_keys, kept_values, turn)
    past = PackedPast.of(kept_keys, kept_values, frame, counts)
    found = past.attend(kernels, q, (own[0], own[1]), scale=case.dim**-0.5)
    for i, (keys, values) in enumerate(alone):
        mine = slice(i, i + 1)
        wanted = attend_decoded(
            keys, values, turn, q[mine], (own[0][mine], own[1][mine]), scale=case.dim**-0.5
        )
        near(found[mine], wanted, dtype, (seed, i))


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: object) -> None:
    assert found.dtype == dtype and found.shape == wanted.shape
    apart = (found.float() - wanted).abs()
    coarse = 8 if dtype == torch.bfloat16 else 1  # of the result itself
    assert apart.max() < CLOSE * coarse and apart.mean() < CLOSE * coarse / 10, (what, apart.max())
