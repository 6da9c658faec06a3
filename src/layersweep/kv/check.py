"""Does a codec keep the promises of `kv.codec.Codec`? Run on random vectors, a verdict for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layersweep.kv.codec import Codec, wants_mean
from layersweep.kv.custom import FAILURES
from layersweep.kv.stream import Stream, keys_and_values, latent_streams

BATCH, HEADS, TOKENS = 3, 2, 70
PIECES = (1, 33, 36)


@dataclass(frozen=True)
class Verdict:
    """One promise; `detail` says what was seen. `kept` None: the codec does not offer it."""

    promise: str
    kept: bool | None
    detail: str


def check(codec: Codec, *, dim: int = 128, seed: int = 0) -> list[Verdict]:
    """All promises, for keys, values and latents of head size `dim`. A codec that raises breaks
    that one; only latents may be refused altogether."""
    streams = *keys_and_values(HEADS, dim), replace(latent_streams(dim, dim)[0], heads=HEADS)
    return [verdict for stream in streams for verdict in _Checks(codec, stream, seed).run()]


class _Checks:
    def __init__(self, codec: Codec, stream: Stream, seed: int) -> None:
        self.simulated = codec.simulated
        # One's own codec itself: what stands around it keeps some promises for it.
        self.codec: Any = getattr(codec, "inner", codec)
        self.stream = stream
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(BATCH, HEADS, TOKENS, stream.dim, generator=generator) * 3 + 0.5
        self.at = torch.arange(TOKENS).expand(BATCH, TOKENS)
        self.mean = self.x.mean(2).half() if wants_mean(codec) else None

    def run(self) -> Iterator[Verdict]:
        promises: tuple[tuple[str, Callable[[], tuple[bool | None, str]]], ...] = (
            ("shape and type of what is decoded", self.shape),
            ("the same input gives the same result", self.deterministic),
            ("a sequence does not depend on its batch", self.batch),
            ("appended in pieces equals encoded at once", self.append),
            ("nbytes is what is stored", self.nbytes),
            ("an infinity or NaN does not decode to a number", self.nonfinite),
            ("the error is below the signal", self.error),
        )
        if self.stream.role == "latent" and (why := self.refusal()):
            yield Verdict("latents: the role is taken", None, f"{why}: no models with MLA")
            return
        for promise, look in promises:
            try:
                kept, detail = look()
            except FAILURES as failure:  # of somebody else's code: what it raises is the finding
                kept, detail = False, f"{type(failure).__name__}: {failure}"
            yield Verdict(f"{self.stream.role}s: {promise}", kept, detail)

    def refusal(self) -> str:
        """What the codec raises for one vector of the stream, or nothing."""
        try:
            mean = None if self.mean is None else self.mean[:1]
            self.through(self.x[:1, :, :1], self.at[:1, :1], mean)
        except FAILURES as failure:
            return f"{type(failure).__name__}: {failure}"
        return ""

    def through(self, x: Tensor, at: Tensor, mean: Tensor | None) -> Tensor:
        decoded: Tensor = self.codec.decode(self.codec.encode(x, self.stream, at, mean), at)
        return decoded

    def shape(self) -> tuple[bool, str]:
        out = self.through(self.x, self.at, self.mean)
        right = out.shape == self.x.shape and out.dtype == torch.float32
        return right, f"{list(out.shape)} {out.dtype}, needed {list(self.x.shape)} torch.float32"

    def deterministic(self) -> tuple[bool, str]:
        first, second = (self.through(self.x, self.at, self.mean) for _ in range(2))
        return torch.equal(first, second), _apart(first, second)

    def batch(self) -> tuple[bool, str]:
        together = self.through(self.x, self.at, self.mean)
        alone = torch.cat([
            self.through(self.x[i : i + 1], self.at[i : i + 1],
                         None if self.mean is None else self.mean[i : i + 1])
            for i in range(BATCH)
        ])  # fmt: skip
        return torch.equal(together, alone), _apart(together, alone)

    def append(self) -> tuple[bool | None, str]:
        if not hasattr(self.codec, "append"):
            return None, "no method append: generation is not possible with it"
        packed, start = None, 0
        for count in PIECES:
            some, at = self.x[:, :, start : start + count], self.at[:, start : start + count]
            packed = (
                self.codec.encode(some, self.stream, at, self.mean)
                if packed is None
                else self.codec.append(packed, some, at)
            )
            start += count
        assert packed is not None
        pieces, whole = self.codec.decode(packed, self.at), self.through(self.x, self.at, self.mean)
        return torch.equal(pieces, whole), _apart(pieces, whole)

    def nbytes(self) -> tuple[bool | None, str]:
        if not hasattr(self.codec, "nbytes"):
            return None, "no method nbytes: the arm is simulated, its bits unknown"
        packed = self.codec.encode(self.x, self.stream, self.at, self.mean)
        claimed = self.codec.nbytes(packed)
        bits = 8 * claimed / self.x.numel()
        held = sum(part.nbytes for part in _tensors(packed))
        words = f"{claimed} bytes claimed ({bits:.3f} bits per element), {held} held in tensors"
        if self.simulated:
            return None, f"{words}; simulated, so it need not hold what it claims"
        return claimed == held, words

    def nonfinite(self) -> tuple[bool, str]:
        bad = []
        for value in (float("nan"), float("inf"), float("-inf")):
            x = self.x.clone()
            x[1, 0, 5, 7] = value
            out = self.through(x, self.at, self.mean)
            if out[1, 0, 5].isfinite().all():
                bad.append(str(value))
        return not bad, f"{', '.join(bad)} became plausible numbers" if bad else "passed on"

    def error(self) -> tuple[bool, str]:
        out = self.through(self.x, self.at, self.mean)
        share = ((out - self.x).square().sum() / self.x.square().sum()).item()
        return share < 1, f"mean squared error is {share:.4f} of the signal's energy"


def _apart(first: Tensor, second: Tensor) -> str:
    if torch.equal(first, second):
        return "equal bit for bit"
    return f"largest difference {(first - second).abs().max().item():.3g}"


def _tensors(packed: Any) -> list[Tensor]:
    """Tensors among the fields of a packed object, each storage once."""
    if isinstance(packed, Tensor):
        return [packed]
    fields = packed.values() if isinstance(packed, dict) else vars(packed).values()
    found = [one for one in fields if isinstance(one, Tensor)]
    return list({one.data_ptr(): one for one in found}.values())
