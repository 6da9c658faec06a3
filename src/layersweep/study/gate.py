"""The gate: a model that does not work must not be measured.

512 tokens, 256 varied ones and the same 256 again, ride on the first sweep as its lead tile.
Every layer is checked as the tile leaves it, and the two copies are compared at the end: a
model whose attention works predicts the second copy far better than the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layersweep.checkpoint.files import LocalFolder, read_small
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import GateError, InputError
from layersweep.families.spec import Decoder
from layersweep.kv.arms import EXACT
from layersweep.model import maths
from layersweep.problems import FileProblem
from layersweep.study.gate_tokens import GateTokens
from layersweep.sweep.record import LayerHealth, Pieces
from layersweep.sweep.sequences import Branch, BranchedSequence, Tile
from layersweep.text.tokenizer import hash_ids

COPY = 256  # tokens, less where the model's limit is below 512
COPY_GAIN = 0.5
# Nats that a scale of all logits may gain: training leaves them where they predict best, but text
# of an unknown kind makes a model too sure (words in random order: 0.23 by halving).
SCALE_GAINS = {0.5: 0.5, 2.0: 0.1}
CARD_TOLERANCE = 0.02
LARGEST_HALF = 3e4  # of a hidden state in float16: the next layer may double it
NAME = "gate"
Losses = Callable[[Tensor, Tensor], Tensor]  # of logits [T, V] and targets [T]


@dataclass(frozen=True)
class Check:
    """One check: `value` must lie on the right side of `limit`; `layer` where it has one."""

    name: str
    passed: bool
    value: float | None
    limit: float | None
    layer: int | None = None


@dataclass(frozen=True)
class Card:
    """The NLL of both copies, and the hash of all 512 tokens that they were measured on."""

    tokens_sha: str
    nll: float
    nll_repeated: float

    @classmethod
    def beside(cls, folder: Path) -> Card | None:
        """The bundled model's; None where there is none, or a file of that name is somebody's."""
        if not folder.is_dir():  # a GGUF file
            return None
        try:
            gate = parse_json(read_small(LocalFolder.at(folder), "card.json"))[0]["gate"]
            return cls(str(gate["tokens_sha"]), float(gate["nll"]), float(gate["nll_repeated"]))
        except (InputError, FileProblem, UnusableJson, ValueError, LookupError, TypeError,
                OverflowError):  # fmt: skip
            return None


class Gate:
    """Collects checks while the sweep runs; raises GateError at the first that fails.

    `card`: what the model's card promises; it counts where its tokens are the gate's. `half`:
    the run computes in float16, which overflows.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens: GateTokens,
        card: Card | None,
        *,
        half: bool = False,
    ) -> None:
        self.decoder, self.tokens, self.half = decoder, tokens, half
        self.ids = tuple(tokens.ids + tokens.ids)
        self.tokens_sha = hash_ids(self.ids)
        known = card is not None and card.tokens_sha == self.tokens_sha
        self.card = card if known else None
        self.checks: list[Check] = []
        self.experts_used: list[int | None] = []
        self.copies_nll: tuple[float, float] | None = None

    def tile(self) -> Tile:
        branch = Branch(EXACT, self.ids, (0, len(self.ids) - 1))
        return Tile(NAME, (BranchedSequence((), (branch,)),))

    def check_layer(self, health: LayerHealth) -> None:
        """Finite everywhere, and a router that sends tokens to different places, where it has a
        choice."""
        layer = health.layer
        self.experts_used.append(health.experts_used)
        largest = health.largest
        self._require(
            Check("finite", math.isfinite(largest), _number(largest), None, layer),
            f"layer {layer}: hidden states are not finite",
            "try --dtype bfloat16 or float32; if that fails too, the layer's weights are damaged",
        )
        if self.half:
            self._require(
                Check("below overflow", largest <= LARGEST_HALF, largest, LARGEST_HALF, layer),
                f"layer {layer}: hidden states reach {largest:.0f}, float16 ends at 65504",
                "--dtype bfloat16 or float32",
            )
        feed = self.decoder.layers[layer].feed
        used, spread = health.experts_used, health.router_spread
        if feed.router is None or feed.router.top_k >= feed.experts:
            return  # nothing to choose
        assert used is not None and spread is not None
        limit = float(feed.router.top_k)
        self._require(
            Check("experts used", used > limit, used, limit, layer),
            f"layer {layer}: {used} distinct experts for {len(self.ids)} tokens, "
            f"needed more than {limit:.0f}",
            f"the router of layer {layer} looks dead: see `layersweep inspect`",
        )
        self._require(
            Check("router spread", spread > 0, spread, 0.0, layer),
            f"layer {layer}: router logits are equal for all tokens",
            f"the router of layer {layer} looks dead: see `layersweep inspect`",
        )

    def check_logits(self, pieces: Pieces, losses: Losses = maths.losses) -> None:
        """Compare the two copies, and the first with its logits halved and doubled: a last norm
        or head of another model has them at another scale. Synthetic weights cannot pass this
        and are not asked to. Overwrites the logits."""
        if self.decoder.synthetic:
            return
        nll = self._losses(pieces, losses)
        half = len(self.ids) // 2
        first, second = nll[1.0][: half - 1].mean().item(), nll[1.0][half:].mean().item()
        self.copies_nll = first, second
        limit = math.log(self.decoder.vocab_size) - 1
        self._require(
            Check("first copy", first < limit, first, limit),
            f"the text's NLL is {first:.3f} nats, needed below {limit:.3f} = ln(vocabulary) - 1",
            "the model predicts no better than chance: wrong tokenizer, or damaged weights",
        )
        gain, needed = first - second, min(COPY_GAIN, first - COPY_GAIN)  # of a text known by heart
        self._require(
            Check("copy gain", gain >= needed, gain, needed),
            f"a repeated text is only {gain:.3f} nats easier, needed {needed:.3g}",
            "attention does not find the first copy: check rope_theta and the layers' norms",
        )
        for scale, allowed in SCALE_GAINS.items():
            gain = first - nll[scale][: half - 1].mean().item()
            self._require(
                Check(f"logits x {scale:g}", gain <= allowed, gain, allowed),
                f"logits times {scale:g} predict the text {gain:.3f} nats better, needed at most "
                f"{allowed}",
                "the logits have the wrong scale: check the last norm and the head",
            )
        if self.card is None:
            return
        promises = {"": (first, self.card.nll), " repeated": (second, self.card.nll_repeated)}
        for copy, (found, promised) in promises.items():
            apart = abs(found - promised)
            self._require(
                Check(f"model card{copy}", apart <= CARD_TOLERANCE, apart, CARD_TOLERANCE),
                f"NLL {found:.4f} of the{copy} text is {apart:.4f} away from the model card's "
                f"{promised:.4f}",
                "this build computes something else than the one that made the card",
            )

    def _losses(self, pieces: Pieces, losses: Losses) -> dict[float, Tensor]:
        """Of all tokens but the first, by what the logits are multiplied with."""
        target = torch.tensor(self.ids[1:])
        found: dict[float, list[Tensor]] = {1.0: [], **{scale: [] for scale in SCALE_GAINS}}
        for at, (logits,) in pieces:
            own, before = target[at].to(logits.device), 1.0
            for scale, parts in found.items():
                parts.append(losses(logits.mul_(scale / before), own))  # powers of two: exact
                before = scale
        return {scale: torch.cat(parts) for scale, parts in found.items()}

    def check_peak(self, peak_bytes: int, planned_bytes: int) -> None:
        """The measured peak must lie within the plan; noted, not fatal: the run is over."""
        passed = peak_bytes <= planned_bytes
        self.checks.append(Check("peak within plan", passed, peak_bytes, planned_bytes))

    def report(self) -> dict[str, Any]:
        """The `gate` section of results.json."""
        return {
            "passed": all(check.passed for check in self.checks),
            "checks": [asdict(check) for check in self.checks],
            "experts_used_per_layer": self.experts_used,
        }

    def forget(self) -> None:
        """Begin again."""
        self.checks, self.experts_used, self.copies_nll = [], [], None

    def restore(self, report: dict[str, Any]) -> None:
        """Take over the report of a run that passed."""
        self.checks = [Check(**check) for check in report["checks"]]
        self.experts_used = list(report["experts_used_per_layer"])

    def _require(self, check: Check, message: str, hint: str) -> None:
        self.checks.append(check)
        if not check.passed:
            raise GateError(f"gate: {message}", hint=hint)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
