"""Dense weights in the compute dtype: one buffer, filled anew for every block that is used."""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.checkpoint.config import ModelConfig
from layersweep.model.compute import Compute
from layersweep.stream.blocks import Block
from layersweep.stream.shapes import dense_bytes


class DenseWeights:
    """One layer's attention weights and one expert's, or the head's, in one buffer.

    qkv [(Q + 2G) D, H]: query, key and value projections as one product; w13 [2I, H] likewise.
    Filling is ordered with the products on the stream, so the buffer is reused at once.
    """

    def __init__(self, config: ModelConfig, compute: Compute) -> None:
        self.config = config
        count = dense_bytes(config, compute.dtype.itemsize) // compute.dtype.itemsize
        self._memory = torch.empty(count, dtype=compute.dtype, device=compute.device)
        hidden, inner = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        shapes = {
            "w13": (2 * inner, hidden), "w2": (hidden, inner), "qkv": (heads + 2 * kv, hidden),
            "o_proj": (hidden, heads), "router": (config.num_local_experts, hidden),
            "input_norm": (hidden,), "post_attention_norm": (hidden,),
        }  # fmt: skip
        views, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + torch.Size(shape).numel()
            views[name] = self._memory[start:end].view(shape)
        self.w13, self.w2 = views["w13"], views["w2"]
        self.qkv, self.o_proj, self.router = views["qkv"], views["o_proj"], views["router"]
        self.q_proj, self.k_proj = self.qkv[:heads], self.qkv[heads : heads + kv]
        self.v_proj = self.qkv[heads + kv :]
        self.input_norm = views["input_norm"]
        self.post_attention_norm = views["post_attention_norm"]
        vocabulary = (config.vocab_size, hidden)
        self.lm_head = self._memory[: torch.Size(vocabulary).numel()].view(vocabulary)
        last = self.lm_head.numel()
        self.norm = self._memory[last : last + hidden]

    def fill_attention(self, block: Block) -> None:
        keys = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "input_norm")
        self._fill(block, {key: getattr(self, key) for key in (*keys, "post_attention_norm")})

    def fill_expert(self, block: Block) -> None:
        inner = self.w2.shape[1]
        parts = {"w1": self.w13[:inner], "w3": self.w13[inner:], "w2": self.w2}
        self._fill(block, parts)

    def fill_head(self, block: Block) -> None:
        """Takes the place of everything else."""
        self._fill(block, {"lm_head": self.lm_head, "norm": self.norm})

    def embedding(self, block: Block) -> Tensor:
        """The table [V, H]: as stored where it is float, else decoded into the buffer."""
        if not block.spec.weights["embed"].packed:
            return block.stored("embed")
        return block.dense("embed", self._memory.dtype, out=self.lm_head)

    def _fill(self, block: Block, parts: dict[str, Tensor]) -> None:
        for key, out in parts.items():
            block.dense(key, out.dtype, out=out)
