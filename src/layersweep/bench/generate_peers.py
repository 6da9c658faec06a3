"""The ways that people generate today, beside ours: each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layersweep.bench.generation import Load
from layersweep.bench.offload_peer import OPPONENT
from layersweep.bench.peers import ask_child, measure_cpu_offload
from layersweep.errors import InputError, LayersweepError
from layersweep.sweep.model import Model

Json = dict[str, Any]
OFFLOADED_LAYERS = 2  # full-size ones, scaled to all


@dataclass(frozen=True)
class Peers:
    """Who generates a load of a model's tokens, by name."""

    model: Model
    load: Load

    @property
    def every(self) -> dict[str, Callable[[], Json]]:
        return {
            "transformers": self._transformers,
            f"{OPPONENT}.cpu_offload": self._cpu_offload,
            "llama.cpp": self._llama_cpp,
        }

    def measured(self, say: Callable[[str], None]) -> list[Json]:
        """A row each: tokens per second of decoding, or why it is left out."""
        rows = []
        for name, measure in self.every.items():
            say(name)
            try:
                rows.append({"job": name, **measure()})
            except LayersweepError as why:
                say(f"left out: {why}")
                rows.append({"job": name, "left_out": str(why)})
        return rows

    def _transformers(self) -> Json:
        return self._generated("transformers", self.model.checkpoint.folder)

    def _llama_cpp(self) -> Json:
        source = Path(self.model.checkpoint.source)
        if source.suffix != ".gguf":
            raise InputError("found a model that is no .gguf file, needed one")
        if find_spec("llama_cpp") is None:
            raise InputError(
                "found no llama_cpp, needed it to measure this peer",
                hint="pip install llama-cpp-python (layersweep does not use it)",
            )
        return self._generated("llama_cpp", source)

    def _generated(self, engine: str, source: Path) -> Json:
        model, load = self.model, self.load
        order = {
            "engine": engine, "source": str(source), "device": str(model.compute.device),
            "dtype": str(model.compute.dtype).removeprefix("torch."),
            "vocab_size": model.decoder.vocab_size, **asdict(load), "vram_cap": model.vram.bytes,
        }  # fmt: skip
        answer = ask_child("generate_peer", engine, order)
        decode_s = answer["decode_s"]
        assert isinstance(decode_s, float)
        made = load.streams * (load.new_tokens - 1)
        return {"tokens_per_s": made / decode_s, **answer}

    def _cpu_offload(self) -> Json:
        """A token of each stream in one pass, without the keys and values of a history."""
        model = self.model
        if model.cpu:
            raise InputError("found the CPU, needed a GPU to offload from")
        config = json.loads((model.checkpoint.folder / "config.json").read_text("utf-8"))
        result = measure_cpu_offload(
            config, model.decoder, str(model.compute.device), OFFLOADED_LAYERS, self.load.streams,
            model.vram.bytes,
        )  # fmt: skip
        rate = self.load.streams / result.seconds_per_pass
        return {"tokens_per_s": rate, "seconds_per_pass": result.seconds_per_pass, **result.detail}
