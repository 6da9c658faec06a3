"""The CPU-offload peer, in a process of its own: `python -m layersweep.bench.offload_peer JSON`.

JSON: config (a config.json's fields), device, layers, tokens, vram_cap. Prints one JSON line.

layersweep neither needs nor uses the offloading library. It is measured here as an opponent, looked
up by name, and never shares a process with the rest of layersweep.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OPPONENT = "accelerate"
SMALL_VOCABULARY = 256  # the head is no part of a layer and would be scaled along with it
POOL_VALUES = 2**25 - 1  # odd: rows of a weight are then not copies of each other
STD = 0.02


def main(order: dict[str, Any]) -> dict[str, object]:
    """Build, offload, run three times, and say how long the last two took."""
    import torch

    device, layers = torch.device(order["device"]), order["layers"]
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, order["vram_cap"] / total), device)
    # half precision is emulated on most CPUs, and no CPU number is ever quoted
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = build(order["config"], layers, dtype)
    layer = model.model.layers[0]
    layer_bytes = sum(parameter.nbytes for parameter in layer.parameters())
    model = import_module(name=OPPONENT).cpu_offload(model, execution_device=device)
    ids = torch.randint(SMALL_VOCABULARY, (1, order["tokens"]), device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(3):
            started = time.perf_counter()
            finite = bool(model(ids, use_cache=False).logits.isfinite().all())  # waits
            seconds.append(time.perf_counter() - started)
    return {
        "seconds": seconds[1:],
        "warm_up_seconds": seconds[0],
        "layer_bytes": layer_bytes,
        "dtype": str(dtype).removeprefix("torch."),
        "finite": finite,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else None,
        "versions": {name: version(name) for name in ("torch", "transformers", OPPONENT)},
    }


def build(fields: dict[str, Any], layers: int, dtype: torch.dtype) -> Any:
    """transformers' model of a config.json with `layers` layers, random weights in host memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = ("architectures", "quantization_config", "dtype", "torch_dtype", "layer_types")
    kept = {name: value for name, value in fields.items() if name not in stored}
    few = {"num_hidden_layers": layers, "vocab_size": SMALL_VOCABULARY}
    config = AutoConfig.for_model(**{**kept, **few, "tie_word_embeddings": False})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model.eval()
    if hasattr(model, "set_experts_implementation"):
        # the only choice that neither takes 14 GiB for 64 tokens on some GPUs nor refuses others
        model.set_experts_implementation("eager")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers hold values
    fill(model, dtype)
    return model


def fill(model: Any, dtype: torch.dtype) -> None:
    """Real memory for every parameter: norms of ones, the rest cut from a pool of random values.

    Drawing 1.45 G values per full-size layer would take longer than the measurement.
    """
    import torch

    pool = torch.randn(POOL_VALUES, generator=torch.Generator().manual_seed(0)).mul_(STD).to(dtype)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty(parameter.shape, dtype=dtype)
        if parameter.dim() == 1:
            value.fill_(1)
        else:
            flat = value.view(-1)
            for start in range(0, len(flat), POOL_VALUES):
                piece = flat[start : start + POOL_VALUES]
                piece.copy_(pool[: len(piece)])
        owner, _, leaf = name.rpartition(".")
        wrapped = torch.nn.Parameter(value, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, wrapped)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
