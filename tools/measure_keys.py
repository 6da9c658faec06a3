"""What each step of the trellis codec's treatment of keys buys, on the bundled model.

    python tools/measure_keys.py        about a minute; prints the table of docs/codecs.md

KL(exact || coded) of attention over a prefix of 1024 keys, nats, mean over 512 queries behind it, 4
heads and 6 held-out windows, added up over the layers. Keys and queries are those of the exact
model, so that every row has the same input.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import layersweep.sweep.attention as attention
from layersweep.cli.app import run
from layersweep.families.spec import Rope
from layersweep.kv import Stream, parse
from layersweep.kv.basis import Basis
from layersweep.kv.means import mean_for
from layersweep.model import maths
from layersweep.model.rope import rope_table

PREFIX, HEADS, DIM, THETA = 1024, 2, 64, 1e6
WINDOWS = (0, 5, 19, 25, 27, 28)
Layer = tuple[Tensor, Tensor, Basis]


def record() -> list[Layer]:
    """Queries behind the prefix, keys of the prefix (both before RoPE) and basis of every layer."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    bases: dict[int, Basis] = {}
    real = attention.attend_group

    def recording(tile: Any, group: Any, projected: Any, out: Tensor, context: Any) -> None:
        if len(group.sequences[0].prefix) == PREFIX:
            q, k = projected.q[:, :, PREFIX : PREFIX + 512], projected.streams[0][:, :, :PREFIX]
            seen.setdefault(context.index, []).append((q.clone(), k.clone()))
            bases[context.index] = context.basis
        real(tile, group, projected, out, context)

    with patch.object(attention, "attend_group", recording):
        run(["eval", "demo", "--tasks", "ppl", "--kv", "K3V2", "--segments", "32"])
    return [
        (*(torch.cat(parts)[list(WINDOWS)] for parts in zip(*pairs, strict=True)), bases[layer])
        for layer, pairs in sorted(seen.items())
    ]  # fmt: skip


def divergence(q: Tensor, exact: Tensor, coded: Tensor) -> float:
    length = PREFIX + 512
    cos, sin = rope_table(Rope(THETA, DIM), torch.arange(length), length)
    turned = maths.rope(q, cos[PREFIX:], sin[PREFIX:])

    def weights(k: Tensor) -> Tensor:
        keys = maths.rope(k, cos[:PREFIX], sin[:PREFIX]).repeat_interleave(2, 1)
        return (turned @ keys.transpose(-1, -2) / DIM**0.5).double().log_softmax(-1)

    p, r = weights(exact), weights(coded)
    return (p.exp() * (p - r)).sum(-1).mean().item()


def through(name: str, k: Tensor, mean: bool = False) -> Tensor:
    arm, at = parse(name), torch.arange(PREFIX).expand(len(k), -1)
    assert arm.codec is not None
    stream = Stream("k", HEADS, DIM, role="key", rope=True)
    return arm.decode(arm.encode(k, stream, at, mean_for(arm.codec, k) if mean else None), at)


def scaled(name: str, k: Tensor, basis: Basis) -> Tensor:
    """Channels divided by the root of their deviation, not the basis: 16 / T bits more."""
    mean = k.mean(2, keepdim=True).half().float()
    size = (k - mean).square().mean(2, keepdim=True) ** 0.25
    return through(name, (k - mean) / size) * size + mean


def in_basis(name: str, k: Tensor, basis: Basis) -> Tensor:
    inside = basis.enter(k)
    return basis.leave(through(name, inside, mean=True))


def main() -> None:
    layers = record()
    rows = {
        "published E8": lambda bits, k, basis: through(f"e8:K{bits}V2", k),
        "rotation, Lloyd-Max": lambda bits, k, basis: through(f"lloyd:K{bits}V2", k),
        "rotation, trellis": lambda bits, k, basis: through(f"trellis:K{bits}V2", k),
        "channel mean, rotation, trellis": lambda bits, k, basis: through(
            f"trellis:K{bits}V2", k, mean=True
        ),
        "the same, channels scaled": lambda bits, k, basis: scaled(f"trellis:K{bits}V2", k, basis),
        "**basis, channel mean, rotation, trellis**": lambda bits, k, basis: in_basis(
            f"trellis:K{bits}V2", k, basis
        ),
        "the same, 2^10 states": lambda bits, k, basis: in_basis(
            f"trellis:K{bits}V2@states=1024", k, basis
        ),
    }
    print("| | b=2 | b=3 | b=4 |\n|---|---|---|---|")
    for name, code in rows.items():
        sums = [
            sum(divergence(q, k, code(b, k, basis)) for q, k, basis in layers) for b in (2, 3, 4)
        ]
        print(f"| {name} | " + " | ".join(f"{one:.4f}" for one in sums) + " |", flush=True)


if __name__ == "__main__":
    main()
