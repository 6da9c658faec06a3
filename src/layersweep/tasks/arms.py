"""What an arm is, as it is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layersweep.kv.arms import EXACT

if TYPE_CHECKING:
    import torch

    from layersweep.kv.arms import Arm

BASELINE = EXACT.name
"""The arm that every other is compared with, as measurements and results.json name it."""
CONTEXTS = {"4096": "4K", "32768": "32K"}
"""Tokens for which a cache's size is computed, and how they are printed."""
KvBytes = dict[str, float]
"""Bytes of the whole cache per token, by context."""


@dataclass(frozen=True)
class ArmInfo:
    """What an arm is. `arm` is the resolved name, `requested` what the user typed."""

    arm: str
    requested: str
    method: str
    key_bits: float | None
    value_bits: float | None
    codec_version: str
    simulated: bool
    encoder: str | None

    @classmethod
    def of(cls, arm: Arm, device: torch.device) -> ArmInfo:
        return cls(
            arm.name, arm.requested, arm.method, arm.key_bits, arm.value_bits,
            arm.codec_version or "", arm.simulated, arm.encoder_on(device),
        )  # fmt: skip
