"""GGML's types: sizes and values equal those of the `gguf` package, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import exactly, ggml_bytes

from layersweep.checkpoint.gguf.config import ARCHITECTURES
from layersweep.checkpoint.storage.ggml import DECODED, TYPES
from layersweep.checkpoint.storage.ggml_blocks import DECODERS, Blocks
from layersweep.kernels.weights import GGML_KINDS
from layersweep.text.splits import SPLITS

ALIASES = {"llama3", "llama-v3"}  # of llama-bpe


def expected(kind: str, data: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(
            gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]).copy()
        )


def test_the_table_of_types_is_that_of_ggml() -> None:
    ours = {name: (one.number, (one.elements, one.nbytes)) for name, one in TYPES.items()}
    theirs = gguf.GGMLQuantizationType
    assert ours == {one.name: (int(one), gguf.GGML_QUANT_SIZES[one]) for one in theirs}
    assert tuple(name.lower() for name in DECODED) == (*GGML_KINDS,)
    assert (*DECODERS,) == DECODED


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DECODED), st.integers(1, 40), st.integers(0, 2**31))
def test_any_bytes_are_decoded_as_by_gguf(kind: str, blocks: int, seed: int) -> None:
    data = ggml_bytes(kind, blocks, seed)
    out = torch.empty(blocks, TYPES[kind].elements)
    Blocks(data.view(-1), TYPES[kind]).decode(out)
    exactly(out, expected(kind, data), seed)


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q8_0"])
def test_a_weight_of_several_pieces_is_rounded_once(kind: str) -> None:
    blocks = (1 << 20) // TYPES[kind].elements + 3
    data = ggml_bytes(kind, blocks, seed=1)
    out = torch.empty(blocks, TYPES[kind].elements, dtype=torch.bfloat16)
    Blocks(data.view(-1), TYPES[kind]).decode(out)
    exactly(out, expected(kind, data).bfloat16(), 1)


def test_turned_rows_are_put_where_transformers_has_them() -> None:
    """llama.cpp's converter turns [heads, 2, D / 2] into [heads, D / 2, 2]."""
    heads, size = 3, 8
    rows = torch.randn(heads * size, 32)
    turned = rows.view(heads, 2, size // 2, 32).transpose(1, 2).reshape(rows.shape)
    data = gguf.quantize(turned.numpy(), gguf.GGMLQuantizationType.Q8_0)
    straight = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    out = torch.empty(rows.shape)
    Blocks(torch.from_numpy(data).view(-1), TYPES["Q8_0"], turned=size).decode(out)
    exactly(out, expected("Q8_0", torch.from_numpy(straight)), 0)


def test_the_table_of_types_in_the_docs_is_the_one_in_the_code() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/formats.md").read_text("utf-8")
    rows = [
        f"| `{one.name}` | {one.elements} | {one.nbytes} | {8 * one.nbytes / one.elements:.4g} |"
        for one in (TYPES[name] for name in ("F32", "F16", "BF16", *DECODED))
    ]
    assert "\n".join(rows) in page
    assert all(f"`{name}`" in page for name in (*ARCHITECTURES, *SPLITS.keys() - ALIASES))
