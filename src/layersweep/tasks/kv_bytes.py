"""What a token takes of a model's whole cache, at contexts that nobody has to compute."""

from __future__ import annotations

import torch

from layersweep.families.spec import Decoder
from layersweep.kv.arms import Arm
from layersweep.kv.size import Keeps, kv_size
from layersweep.model.compute import Compute
from layersweep.sweep.streams import layer_states, layer_streams
from layersweep.tasks.arms import CONTEXTS, KvBytes
from layersweep.tasks.finite import finite


def kv_bytes(arm: Arm, decoder: Decoder, compute: Compute) -> KvBytes | None:
    """Bytes of the whole cache per token, at each of CONTEXTS, by arithmetic: windows, latents,
    states, sinks and layers that stay exact count as what they hold. None where a layer or a codec
    does not say what it keeps."""
    generic, states = decoder.generic, layer_states(decoder)
    if states is None:
        return None
    if generic and (generic.exact_only or any(layer.chunk for layer in generic.layers)):
        return None  # keys and values are not what is kept, or not for how long
    layers: list[Keeps] = [
        [*streams, *of] for streams, of in zip(layer_streams(decoder), states, strict=True)
    ]
    like = torch.empty(0, dtype=compute.dtype, device=compute.device)
    found = {at: finite(kv_size(arm, layers, int(at), like).bytes_per_token) for at in CONTEXTS}
    known = {at: size for at, size in found.items() if size is not None}
    return known or None
