"""What a scheduler has done, for those who measure it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from layersweep.kv.arms import Arm


@dataclass
class Counts:
    """Since the start. `launch_s`: of the host; `stall_s`: that computation waited for weights;
    `phases`: seconds by the device's own clock. On the CPU, where nothing is launched, the first is
    the time of computing."""

    walks: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    set_back: int = 0
    weight_bytes_read: int = 0
    weight_bytes_copied: int = 0
    copy_s: float = 0.0
    stall_s: float = 0.0
    launch_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)


class Rider(NamedTuple):
    """A text in a walk: `tokens` of it were read after the `past` ones that it had."""

    arm: Arm
    past: int
    tokens: int
