"""Time attention that reads codes beside attention over fp16, one new token per sequence.

    python tools/time_packed.py [--streams 8] [--tokens 16384] [--arms K3V2,K4V2,trellis:K3V2]

Prints a line of JSON per arm: milliseconds on the device (medians of 20 rounds, everything in turn,
10 calls between two events), the bytes that each way has to read, and the largest difference from
decoding first. `packed` and `sdpa` are CUDA graphs, which wait for no host; `packed_calls` is not.
The parts of `packed` follow it. A bare name predicts values from keys, a spelled-out one does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from layersweep.families.spec import Rope
from layersweep.kernels import Kernels, load_kernels
from layersweep.kernels.packed import Weighed, packed_refusal
from layersweep.kv.arms import parse
from layersweep.kv.basis import Basis
from layersweep.kv.fit import Prediction
from layersweep.kv.packed_attention import LOG2_E, Frame, PackedPast, Turn, attend_decoded
from layersweep.kv.store import KvStore
from layersweep.kv.stream import keys_and_values
from layersweep.kv.trellis_scale import scale_values
from layersweep.model.rope import rope_table

DEVICE = torch.device("cuda:0")
ROUNDS, EACH = 20, 10
GROUPS, RATIO, DIM = 8, 4, 128  # Mixtral's, Llama 3's 8B's
Work = Callable[[], object]


def medians(works: Mapping[str, Work]) -> dict[str, float]:
    """Milliseconds of a call of each, round by round in turn."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            events = [torch.Event("cuda", enable_timing=True) for _ in range(2)]
            work()
            events[0].record()
            for _ in range(EACH):
                work()
            events[1].record()
            torch.cuda.synchronize()
            spent[name].append(events[0].elapsed_time(events[1]) / EACH)
    return {name: round(statistics.median(times), 4) for name, times in spent.items()}


def captured(work: Work) -> Work:
    """The same as one CUDA graph."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float16, device=DEVICE)


def time_arm(kernels: Kernels, arm: str, streams: int, tokens: int) -> dict[str, object]:
    k, v = random(streams, GROUPS, tokens, DIM), random(streams, GROUPS, tokens, DIM)
    own = random(streams, GROUPS, 1, DIM), random(streams, GROUPS, 1, DIM)
    q = random(streams, GROUPS * RATIO, DIM)
    past, error = packed(kernels, arm, k, v, q, own)
    scale = DIM**-0.5

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True)

    def sdpa_rows() -> Tensor:  # as sweep/step.py asks: query heads of a group are rows
        rows = q.view(streams, GROUPS, RATIO, DIM)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale)

    def calls() -> Tensor:
        return past.attend(kernels, q, own, scale=scale)

    works = {
        "sdpa": captured(sdpa), "sdpa_rows": captured(sdpa_rows), "packed": captured(calls),
        "packed_calls": calls, **parts(kernels, past, q, scale),
    }  # fmt: skip
    codes = sum(
        one.nbytes
        for coded in (past.keys, past.values)
        for one in (coded.codes, coded.scales, coded.flags)
        if one is not None
    )
    return {
        "arm": parse(arm, growing=True).name, "streams": streams, "tokens": tokens,
        "ms": medians(works), "apart": error,
        "mb": {"packed": round(codes / 1e6, 1), "sdpa": round((k.nbytes + v.nbytes) / 1e6, 1)},
    }  # fmt: skip


def packed(
    kernels: Kernels, arm: str, k: Tensor, v: Tensor, q: Tensor, own: tuple[Tensor, Tensor]
) -> tuple[PackedPast, float]:
    """The cache under an arm, and how far its attention is from that of decoded tokens, at most."""
    turn = torch.linalg.qr(torch.randn(GROUPS, DIM, DIM, device=DEVICE))[0]
    width = GROUPS * DIM
    told = torch.randn(width, width, device=DEVICE).half() / width**0.5
    keys, values = keys_and_values(GROUPS, DIM)
    keys = replace(keys, basis=Basis(turn.mT.contiguous(), turn.contiguous()))
    if parse(arm, growing=True).fits:
        values = replace(values, prediction=Prediction(told))
    store = KvStore.empty([(parse(arm, growing=True), (keys, values))], 0, 1, mean_tokens=128)
    kept = store.appended((k, v)).arms[0]
    tokens = k.shape[2] + 1
    table = rope_table(Rope(5e5, DIM), torch.arange(tokens, device=DEVICE), tokens)
    rope = Turn.of(*table, DIM)
    past = PackedPast.of(kept[0], kept[1], Frame.of(kept[0], kept[1], rope))
    found = past.attend(kernels, q, own, scale=DIM**-0.5).float()
    wanted = attend_decoded(kept[0], kept[1], rope, q, own, scale=DIM**-0.5)
    return past, round(float((found - wanted).abs().max()), 6)


def parts(kernels: Kernels, past: PackedPast, q: Tensor, scale: float) -> dict[str, Work]:
    """The launches that take time, on their own; queries are already in pairs."""
    frame, factors = past.frame, scale_values(DEVICE)
    turn, asked = frame.turn, frame.turn.pairs(q).float() * scale * LOG2_E

    def scores() -> Weighed:
        return kernels.packed_scores(
            asked, past.keys, past.values, factors, past.around, frame.matrix, turn.near,
            (turn.cos, turn.sin), past.spans, 0.0,
        )  # fmt: skip

    weighed = scores()

    def sums(of_keys: bool) -> Tensor:
        coded = past.keys if of_keys else past.values
        return kernels.packed_sums(coded, factors, past.spans, weighed, of_keys)

    return {
        "scores": scores, "sums_of_keys": lambda: sums(True), "sums_of_values": lambda: sums(False)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--arms", default="K3V2,K4V2,K2V2,trellis:K3V2")
    args = parser.parse_args()
    if why := packed_refusal(DEVICE, DIM, 3):
        parser.error(why)
    kernels = load_kernels(DEVICE, torch.float16)
    for arm in args.arms.split(","):
        found = time_arm(kernels, arm, args.streams, args.tokens)
        print(json.dumps({"device": torch.cuda.get_device_name(DEVICE), **found}), flush=True)


if __name__ == "__main__":
    main()
