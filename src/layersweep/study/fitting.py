"""Which arms a model's keys and values fit, and what is simpler for them than wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layersweep.errors import Fallback, InputError
from layersweep.families.spec import Decoder
from layersweep.kv.arms import Arm
from layersweep.kv.codec import check_stream
from layersweep.kv.stream import Stream
from layersweep.kv.trellis_search import numba_refusal
from layersweep.sweep.shapes import can_fit

SLOW_ON_GPU = "its kernels are for 1 to 4 bits and need NVRTC"


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


def arm_fallbacks(arms: Sequence[Arm], decoder: Decoder, device: torch.device) -> list[Fallback]:
    """What a model and a device do for some arms in a simpler way than wanted."""
    slow = [
        arm.name for arm in arms if arm.method == "trellis" and arm.encoder_on(device) == "torch"
    ]
    found: list[Fallback] = []
    if slow:
        why = numba_refusal() if device.type == "cpu" else SLOW_ON_GPU
        wanted, used = "a compiled search", "plain torch, slower"
        found += [Fallback(f"encoder of {name}", wanted, used, why) for name in slow]
    if not can_fit(decoder):
        wanted, used = "those of the reference text", "those in which keys come"
        why = "transformers' own layers, or latents, have no others"
        fits = [arm.name for arm in arms if arm.fits]
        found += [Fallback(f"coordinates of {name}", wanted, used, why) for name in fits]
    return found
