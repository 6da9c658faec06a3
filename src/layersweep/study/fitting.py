"""Which arms a model's keys and values fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layersweep.errors import Fallback, InputError
from layersweep.kv.arms import Arm
from layersweep.kv.codec import check_stream
from layersweep.kv.stream import Stream


def fitting_arms(
    arms: Sequence[Arm], streams: Sequence[Stream], device: torch.device, dtype: torch.dtype
) -> tuple[list[Arm], list[Fallback]]:
    """The arms that take all `streams`, and what `all` has to leave out.

    Raises InputError for an arm that was asked for by its own name, and where `all` leaves none.
    """
    fitting, left_out = [], []
    for arm in arms:
        try:
            for codec in arm.codecs:
                for stream in streams:
                    check_stream(codec, stream, device, dtype)
        except InputError as refusal:
            if arm.requested.lower() != "all":
                raise
            left_out.append(Fallback("--kv all", arm.name, "nothing: left out", str(refusal)))
        else:
            fitting.append(arm)
    if left_out and not fitting:
        raise InputError(f"--kv all: found no arm that takes this model: {left_out[0].why}")
    return fitting, left_out
