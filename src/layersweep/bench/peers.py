"""How people run such a model today, measured on this machine as baselines.

Each peer runs a few full-size layers and is scaled to all layers of the model, which must be alike.
Embedding and head (2 % of the NF4 bytes of Mixtral-8x7B, 0.6 % of the float16 ones) are left out.

- Synchronous NF4 (`sync_nf4`): layer by layer, packed tensors from ordinary host memory to the
  device, every weight made dense there, plain torch. layersweep replaces this way.
- CPU offload: transformers' own model in float16 under the usual offloading library, in a
  process of its own (`offload_peer`), so that this one never loads that library.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from layersweep.bench.offload_peer import OPPONENT
from layersweep.bench.sync_nf4 import SyncNf4
from layersweep.checkpoint import open_checkpoint
from layersweep.errors import InputError, LayersweepError
from layersweep.families.spec import Decoder

MEASURED_PASSES = 3
CHILD_LIMIT_S = 900.0


@dataclass(frozen=True)
class PeerResult:
    """One peer. seconds_per_pass and bytes_per_pass: one forward pass, scaled to `layers`.

    bytes_per_pass counts what crosses to the device. detail: what the number rests on, as JSON.
    """

    name: str
    seconds_per_pass: float
    layers: int
    layers_measured: int
    tokens: int
    bytes_per_pass: int
    detail: dict[str, object]


def measure_sync_nf4(
    folder: Path | str, device: str, layers: int, tokens: int, vram_cap: int
) -> PeerResult:
    """One sequence of `tokens` tokens through the first `layers` layers of the checkpoint.

    Median over layers of three passes after one that warms up; float16 on a GPU, float32 on the
    CPU. `vram_cap`: bytes of device memory that this process may take meanwhile. Raises InputError
    for more layers than there are, and for a model that this peer does not run.
    """
    place = torch.device(device)
    peer = SyncNf4(open_checkpoint(str(folder)), place, layers)
    ids = torch.randint(
        peer.decoder.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)
    )
    with memory_cap(place, vram_cap), torch.inference_mode():
        hidden = peer.embed(ids)
        times: list[tuple[float, float]] = []
        for _ in range(1 + MEASURED_PASSES):
            times += peer.timed_pass(hidden)
        peak = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None
    copies, seconds = zip(*times[layers:], strict=True)
    nbytes, whole = sum(peer.layer_bytes) // layers, peer.decoder.num_hidden_layers
    return PeerResult(
        name="synchronous NF4",
        seconds_per_pass=whole * statistics.median(seconds),
        layers=whole,
        layers_measured=layers,
        tokens=tokens,
        bytes_per_pass=whole * nbytes,
        detail={
            "seconds_per_layer": list(seconds),
            "copy_seconds_per_pass": whole * statistics.median(copies),
            "dequantize": "bitsandbytes" if peer.bitsandbytes else "torch",
            "dtype": str(peer.dtype).removeprefix("torch."),
            "peak_device_bytes": peak,
        },
    )


def measure_cpu_offload(
    config: Mapping[str, Any],
    decoder: Decoder,
    device: str,
    layers: int,
    tokens: int,
    vram_cap: int,
) -> PeerResult:
    """One forward pass of `tokens` tokens through `layers` layers of the model of a config.json,
    which `decoder` describes.

    Median of two after one that warms up. Random float16 weights (float32 on the CPU); they take
    2.9 GB of host memory per layer of Mixtral-8x7B. Raises InputError where the library is not
    installed and for a model whose layers differ, LayersweepError with the child's last words
    where it fails.
    """
    if (kinds := len(decoder.distinct_layers)) > 1 or decoder.generic:
        found = f"{kinds} kinds of layers" if kinds > 1 else "a family without a table"
        raise InputError(
            f"{decoder.model_type}: found {found}, needed layers that are known to be alike: a few "
            "of them stand for all",
            hint="measure a model whose layers are alike, for example llama or qwen3_moe",
        )
    if find_spec(name=OPPONENT) is None:
        raise InputError(
            f"found no {OPPONENT}, needed it to measure this peer",
            hint=f"pip install {OPPONENT} (nothing else of layersweep uses it)",
        )
    order = {"config": dict(config), "device": device, "layers": layers, "tokens": tokens,
             "vram_cap": vram_cap}  # fmt: skip
    answer = ask_child("offload_peer", OPPONENT, order)
    seconds = answer["seconds"]
    nbytes = answer["layer_bytes"]
    assert isinstance(seconds, list) and isinstance(nbytes, int)
    whole = decoder.num_hidden_layers
    return PeerResult(
        name=f"{OPPONENT}.cpu_offload",
        seconds_per_pass=statistics.median(seconds) / layers * whole,
        layers=whole,
        layers_measured=layers,
        tokens=tokens,
        bytes_per_pass=nbytes * whole,
        detail=answer,
    )


def ask_child(module: str, name: str, order: Mapping[str, object]) -> dict[str, object]:
    """What the module that measures the peer `name` printed last, as JSON."""
    command = [sys.executable, "-m", f"layersweep.bench.{module}", json.dumps(order)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_LIMIT_S)
    except subprocess.TimeoutExpired as failure:
        raise LayersweepError(
            f"{name}: no answer in {CHILD_LIMIT_S:.0f} s", hint="measure less of it"
        ) from failure
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines() or ["nothing was said"]
        said = next((line for line in reversed(words) if "Error" in line), words[-1])
        raise LayersweepError(
            f"{name}: the child process ended with {done.returncode}: {said}",
            hint="measure less of it, or check that the installed versions work together",
        )
    answer: dict[str, object] = json.loads(lines[-1])
    return answer


@contextmanager
def memory_cap(device: torch.device, nbytes: int) -> Iterator[None]:
    """Let this process's allocator take at most `nbytes` of a GPU; nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()  # the next peer is another process on the same device
