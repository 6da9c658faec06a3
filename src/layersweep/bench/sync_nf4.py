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
from layersweep.checkpoint.nf4 import CODES, QuantizedTensor
from layersweep.errors import InputError
from layersweep.model import maths
from layersweep.model.rope import rope_table
from layersweep.model.routing import choose_experts


@dataclass(frozen=True)
class LoadedWeight:
    """A weight's stored tensors (uint8), in host memory or on a device, as `storage` has them."""

    weight: Weight
    parts: tuple[Tensor, ...]

    @classmethod
    def read(cls, weight: Weight) -> LoadedWeight:
        pieces = weight.storage.pieces
        parts = tuple(torch.empty(piece.nbytes, dtype=torch.uint8) for piece in pieces)
        for piece, part in zip(pieces, parts, strict=True):
            if piece.source is not None:
                part.copy_(read_tensor(piece.source))
        if any(piece.source is None for piece in pieces):
            weight.storage.make(read_tensor, parts, weight.shape)
        return cls(weight, parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> LoadedWeight:
        """Copied with plain `.to`, which waits: this is how it is usually done."""
        return LoadedWeight(self.weight, tuple(part.to(device) for part in self.parts))

    def dense(self, dtype: torch.dtype, bitsandbytes: bool) -> Tensor:
        packed = self.weight.storage.packed(self.parts, self.weight.shape)
        if bitsandbytes and isinstance(packed, QuantizedTensor):
            return dequantize_bitsandbytes(packed, self.weight.shape, dtype)
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.parts[0].device)
        packed.decode(out)
        return out


def read_tensor(stored: StoredTensor) -> Tensor:
    """The bytes of a tensor (uint8) in ordinary (pageable) host memory."""
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        if file.readinto(raw.numpy().data) != stored.nbytes:
            raise InputError(
                f"{stored.file}: {stored.name}: found its end too early, needed "
                f"{stored.nbytes} bytes",
                hint="the file was changed while it was read",
            )
    return raw


def dequantize_bitsandbytes(
    packed: QuantizedTensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """By that library's kernel, from the same tensors. Packed bytes stay a column: it returns
    the transpose of a row."""
    functional: Any = import_module("bitsandbytes.functional")
    device, offset, inner = packed.packed.device, None, None
    if packed.nested is not None:
        offset = torch.tensor(packed.nested.offset, device=device)
        inner = functional.QuantState(
            absmax=packed.nested.absmax, code=packed.nested.quant_map,
            blocksize=packed.nested.blocksize, dtype=torch.float32,
        )  # fmt: skip
    code = torch.tensor(CODES[packed.kind], device=device)
    state = functional.QuantState(
        absmax=packed.absmax, shape=torch.Size(shape), code=code, blocksize=packed.blocksize,
        quant_type=packed.kind, dtype=dtype, offset=offset, state2=inner,
    )  # fmt: skip
    dense: Tensor = functional.dequantize_4bit(packed.packed.view(-1, 1), state)
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
