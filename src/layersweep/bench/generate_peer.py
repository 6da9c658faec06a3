"""A library that generates, in a process of its own:
`python -m layersweep.bench.generate_peer JSON`.

JSON: engine ("transformers" or "llama_cpp"), source, device, dtype, vocab_size, streams,
prompt_tokens (random ones), new_tokens, vram_cap. Prints one JSON line. layersweep generates
without either; what they bring into a process stays out of the one where it is measured.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any


def main(order: dict[str, Any]) -> dict[str, object]:
    """Generate greedily, once with one new token and once with all; seconds of each, best of two
    after one that warms up."""
    engines = {"transformers": _transformers, "llama_cpp": _llama_cpp}
    return engines[order["engine"]](order)


def _transformers(order: dict[str, Any]) -> dict[str, object]:
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device(order["device"])
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, order["vram_cap"] / total), device)
    dtype = getattr(torch, order["dtype"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(order["source"], dtype=dtype)
    model = loaded if getattr(loaded, "is_quantized", False) else loaded.to(device)
    ids = torch.tensor(_prompts(order), device=model.device)

    def generate(tokens: int) -> None:
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                min_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        assert made[:, ids.shape[1] :].tolist()  # waits

    return {
        **_timed(generate, order),
        "quantized": bool(getattr(loaded, "is_quantized", False)),
        "dtype": order["dtype"],
        "peak_device_bytes": torch.cuda.max_memory_reserved(device)
        if device.type == "cuda"
        else None,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _llama_cpp(order: dict[str, Any]) -> dict[str, object]:
    """One stream after the other: its Python interface has no batch."""
    llama_cpp: Any = import_module("llama_cpp")
    layers = 0 if order["device"] == "cpu" else -1
    length = order["prompt_tokens"] + order["new_tokens"]
    model = llama_cpp.Llama(
        order["source"], n_ctx=length, n_gpu_layers=layers, logits_all=False, verbose=False
    )

    prompts = _prompts(order)

    def generate(tokens: int) -> None:
        for ids in prompts:
            model.reset()
            made = model.generate(ids, temp=0.0, top_k=1)
            for _ in range(tokens):
                next(made)

    return {**_timed(generate, order), "versions": {"llama_cpp": llama_cpp.__version__}}


def _prompts(order: dict[str, Any]) -> list[list[int]]:
    draw = random.Random(0).randrange
    return [
        [draw(order["vocab_size"]) for _ in range(order["prompt_tokens"])]
        for _ in range(order["streams"])
    ]


def _timed(generate: Callable[[int], None], order: dict[str, Any]) -> dict[str, object]:
    """Seconds until every stream has its first token, and those of all others."""

    def best(tokens: int) -> float:
        times = []
        for _ in range(2):
            started = time.perf_counter()
            generate(tokens)
            times.append(time.perf_counter() - started)
        return min(times)

    generate(2)
    first, every = best(1), best(order["new_tokens"])
    return {"prefill_s": first, "decode_s": every - first}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
