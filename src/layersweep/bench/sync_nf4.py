"""The way that layersweep replaces: NF4, one layer at a time, every copy waited for, plain torch.

Written afresh as a baseline in an ordinary style, with nothing of `stream` or `sweep`: packed
tensors in pageable host memory, `.to(device)`, each weight made dense there while it is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layersweep.checkpoint import Checkpoint, StoredTensor, Weight
from layersweep.checkpoint.nf4 import CODES, dequantize, expand_absmax
from layersweep.errors import InputError
from layersweep.model import maths
from layersweep.model.rope import rope_table
from layersweep.model.routing import choose_experts

TORCH_DTYPES = {
    **{"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F32": torch.float32, "F64": torch.float64},
}


@dataclass(frozen=True)
class LoadedWeight:
    """A weight's stored tensors, in host memory or on a device; quantized if it has scales."""

    weight: Weight
    data: Tensor
    absmax: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None

    @classmethod
    def read(cls, weight: Weight) -> LoadedWeight:
        quant = weight.quant
        if quant is None:
            return cls(weight, read_tensor(weight.data).view(weight.shape))
        data, absmax = read_tensor(weight.data).view(torch.uint8), read_tensor(quant.absmax)
        if quant.nested is None:
            return cls(weight, data, absmax)
        nested, offset = quant.nested, quant.nested.offset
        outer, table = read_tensor(nested.absmax), read_tensor(nested.quant_map)
        if nested.skip:  # no kernel starts inside a nested block
            scales = expand_absmax(absmax, outer, table, nested.blocksize, offset, nested.skip)
            return cls(weight, data, scales)
        return cls(weight, data, absmax, outer, table)

    @property
    def nbytes(self) -> int:
        parts = (self.data, self.absmax, self.nested_absmax, self.nested_map)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device) -> LoadedWeight:
        """Copied with plain `.to`, which waits: this is how it is usually done."""

        def move(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        return LoadedWeight(
            self.weight, self.data.to(device), move(self.absmax), move(self.nested_absmax),
            move(self.nested_map),
        )  # fmt: skip

    def dense(self, dtype: torch.dtype, bitsandbytes: bool) -> Tensor:
        quant = self.weight.quant
        if quant is None or self.absmax is None:
            return self.data.to(dtype)
        if bitsandbytes:
            return dequantize_bitsandbytes(self, dtype)
        scales = self.absmax
        if self.nested_absmax is not None:
            assert quant.nested is not None and self.nested_map is not None
            scales = expand_absmax(
                scales, self.nested_absmax, self.nested_map,
                quant.nested.blocksize, quant.nested.offset,
            )  # fmt: skip
        code = CODES[quant.kind]
        return dequantize(self.data, scales, quant.blocksize, self.weight.shape, dtype, code=code)


def read_tensor(stored: StoredTensor) -> Tensor:
    """A flat tensor of `stored`'s dtype in ordinary (pageable) host memory."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        if file.readinto(raw.numpy().data) != stored.nbytes:
            raise InputError(
                f"{stored.file}: {stored.name}: found its end too early, needed "
                f"{stored.nbytes} bytes",
                hint="the file was changed while it was read",
            )
    return raw.view(TORCH_DTYPES[stored.dtype])


def dequantize_bitsandbytes(loaded: LoadedWeight, dtype: torch.dtype) -> Tensor:
    """By that library's kernel, from the same tensors. Packed bytes stay a column: it returns
    the transpose of a row."""
    functional: Any = import_module("bitsandbytes.functional")
    quant = loaded.weight.quant
    assert quant is not None and loaded.absmax is not None
    offset = inner = None
    if loaded.nested_absmax is not None:
        assert quant.nested is not None
        offset = torch.tensor(quant.nested.offset, device=loaded.data.device)
        inner = functional.QuantState(
            absmax=loaded.nested_absmax, code=loaded.nested_map,
            blocksize=quant.nested.blocksize, dtype=torch.float32,
        )  # fmt: skip
    code = torch.tensor(CODES[quant.kind], device=loaded.data.device)
    state = functional.QuantState(
        absmax=loaded.absmax, shape=torch.Size(loaded.weight.shape), code=code,
        blocksize=quant.blocksize, quant_type=quant.kind, dtype=dtype, offset=offset, state2=inner,
    )  # fmt: skip
    dense: Tensor = functional.dequantize_4bit(loaded.data.view(-1, 1), state)
    return dense


class SyncNf4:
    """The first `layers` layers of a checkpoint in host memory, run one at a time on `device`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, layers: int) -> None:
        self.decoder, self.device = checkpoint.decoder, device
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        # on a CPU with AVX-512 its 0.50.2 decodes wrongly where a block crosses rows
        self.bitsandbytes = device.type == "cuda" and find_spec(name="bitsandbytes") is not None
        if self.decoder.model_type != "mixtral":
            raise InputError(
                f"found {self.decoder.model_type}, needed mixtral, which is what people ran so",
                hint="`layersweep synth DST --shape mixtral-8x7b` writes one",
            )
        there = self.decoder.num_hidden_layers
        if not 1 <= layers <= there:
            raise InputError(
                f"layers: found {layers}, needed 1 to {there}", hint=f"measure {there} layers"
            )
        self.weights = checkpoint.weights
        self.layers = [self._read_layer(index) for index in range(layers)]
        self.layer_bytes = [sum(one.nbytes for one in layer.values()) for layer in self.layers]

    def _read_layer(self, index: int) -> dict[str, LoadedWeight]:
        at = f"layers.{index}."
        return {
            name.removeprefix(at): LoadedWeight.read(weight)
            for name, weight in self.weights.items()
            if name.startswith(at)
        }

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states [N, H] on the device of token ids [N]."""
        table = self._outer("embed")
        return table[ids.to(table.device)].to(self.device)

    def _outer(self, name: str) -> Tensor:
        return LoadedWeight.read(self.weights[name]).to(self.device).dense(
            self.dtype, self.bitsandbytes)  # fmt: skip

    def timed_pass(self, hidden: Tensor) -> list[tuple[float, float]]:
        """Seconds of each layer: of its copies, and from the first copy to the last result."""
        times = []
        for layer in self.layers:
            self._wait()
            started = time.perf_counter()
            packed = self._moved(layer)
            copied = time.perf_counter()
            hidden = self._run_layer(packed, hidden)
            del packed
            self._wait()
            times.append((copied - started, time.perf_counter() - started))
        return times

    def _moved(self, layer: Mapping[str, LoadedWeight]) -> dict[str, LoadedWeight]:
        return {name: weight.to(self.device) for name, weight in layer.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [N, V] after the layers that were read: all of them give the model's own."""
        with torch.inference_mode():
            hidden = self.embed(torch.tensor(ids))
            for layer in self.layers:
                hidden = self._run_layer(self._moved(layer), hidden)
            hidden = maths.rms_norm(hidden, self._outer("norm"), self.decoder.norm.eps)
            return maths.linear(hidden, self._outer("lm_head")).float()

    def _run_layer(self, packed: Mapping[str, LoadedWeight], hidden: Tensor) -> Tensor:
        """Hidden states [N, H] of one sequence after one layer; a weight is dense while used."""

        def dense(name: str) -> Tensor:
            return packed[name].dense(self.dtype, self.bitsandbytes)

        layer = self.decoder.layers[0]
        eps, attention = self.decoder.norm.eps, layer.attention
        x = maths.rms_norm(hidden, dense("attention_norm"), eps)
        q, k, v = (self._heads(maths.linear(x, dense(f"{name}_proj"))) for name in "qkv")
        positions = torch.arange(len(x), device=self.device)
        assert attention.rope is not None
        table = rope_table(attention.rope, positions, len(x))
        out = maths.attend(maths.rope(q, *table), maths.rope(k, *table), v, None)
        out = out[0].transpose(0, 1).reshape(len(x), -1)
        hidden = hidden + maths.linear(out, dense("o_proj"))
        x = maths.rms_norm(hidden, dense("feed_norm"), eps)
        return hidden + self._experts(x, dense)

    def _heads(self, x: Tensor) -> Tensor:
        head_dim = self.decoder.layers[0].attention.head_dim
        return x.view(1, len(x), -1, head_dim).transpose(1, 2)  # [1, heads, N, D]

    def _experts(self, x: Tensor, dense: Callable[[str], Tensor]) -> Tensor:
        """The weighted sum [N, H] of each row's experts, in a loop over those that have rows."""
        router = self.decoder.layers[0].feed.router
        assert router is not None
        logits = maths.linear(x, dense("router"))
        share, chosen = choose_experts(logits, router, torch.float32)
        update = torch.zeros_like(x)
        for expert in range(self.decoder.num_experts):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            if len(rows) == 0:
                continue
            parts = ("gate_proj", "up_proj", "down_proj")
            gate, up, down = (dense(f"experts.{expert}.{name}") for name in parts)
            inner = F.silu(maths.linear(x[rows], gate)) * maths.linear(x[rows], up)
            y = maths.linear(inner, down) * share[rows, slots, None]
            update.index_add_(0, rows, y.to(update.dtype))
        return update
