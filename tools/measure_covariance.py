"""What the calibrated rotation of OSCAR adds to the Hadamard matrix, on a model's own attention.

    python tools/measure_covariance.py MODEL TEXT

MODEL: a Llama checkpoint that transformers loads; TEXT: 3,072 tokens of it, the first 2,048 for
covariances, the rest to measure on. Keys and values of every layer and KV head go through the
arithmetic of `oscar:K2V2`, the first 4 tokens kept exact, under each rotation. Printed, as means
over heads and queries: KL(exact || coded) of attention in nats for keys, and for values the
squared error of attention's output over its square.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers.models.llama.modeling_llama as llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from layersweep.kv.oscar import KEYS_WITHIN, VALUES_WITHIN, Oscar

CALIBRATION, MEASURED, SINK, FIRST_QUERY, BITS = 2048, 1024, 4, 200, 2
Seen = dict[int, tuple[Tensor, Tensor, Tensor]]  # of each layer: q [H,T,D], k, v [G,T,D], turned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = tokenizer(given.text.read_text("utf-8"))["input_ids"][: CALIBRATION + MEASURED]
    calibration, measured = (seen(model, part) for part in (ids[:CALIBRATION], ids[CALIBRATION:]))
    frequencies = model.model.rotary_emb.inv_freq
    found: dict[str, list[float]] = defaultdict(list)
    for layer, tensors in measured.items():
        for group in range(len(tensors[1])):
            ours, theirs = (of_group(some, group) for some in (tensors, calibration[layer]))
            for name, value in compared(ours, theirs, frequencies).items():
                found[name].append(value)
    for name, values in found.items():
        print(f"{name:40} {sum(values) / len(values):.4f}")


def seen(model: Any, ids: list[int]) -> Seen:
    """What attention gets for a text, after RoPE."""
    layers: Seen = {}
    real = llama.eager_attention_forward

    def recording(module: Any, q: Tensor, k: Tensor, v: Tensor, *given: Any, **named: Any) -> Any:
        layers[module.layer_idx] = q[0], k[0], v[0]
        return real(module, q, k, v, *given, **named)

    with patch.object(llama, "eager_attention_forward", recording), torch.inference_mode():
        model(torch.tensor([ids]))
    return layers


def of_group(tensors: tuple[Tensor, Tensor, Tensor], group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [R, T, D] that read one KV head, its keys and values [T, D]."""
    q, k, v = tensors
    return q.chunk(len(k))[group], k[group], v[group]


def compared(
    measured: tuple[Tensor, Tensor, Tensor],
    calibration: tuple[Tensor, Tensor, Tensor],
    frequencies: Tensor,
) -> dict[str, float]:
    """The figure of each rotation for one KV head."""
    q, k, v = measured
    exact = scores(q, k)
    output = exact.exp() @ v
    cq, cv = covariances(*calibration)
    plain = torch.eye(k.shape[1])
    before = turned(k, frequencies, -1)
    keys = {
        "keys after RoPE, Hadamard": coded(k, plain, KEYS_WITHIN),
        "keys after RoPE, eigenvectors (published)": coded(k, eigenvectors(cq), KEYS_WITHIN),
        "keys before RoPE, Hadamard (oscar)": turned(
            coded(before, plain, KEYS_WITHIN), frequencies, 1
        ),
    }
    values = {
        "values, Hadamard (oscar)": coded(v, plain, VALUES_WITHIN),
        "values, eigenvectors (published)": coded(v, eigenvectors(cv), VALUES_WITHIN),
    }
    found = {}
    for name, some in keys.items():
        kl = (exact.exp() * (exact - scores(q, kept(some, k)))).nansum(-1)
        found[name] = kl[:, FIRST_QUERY:].mean().item()
    for name, some in values.items():
        error = (exact.exp() @ kept(some, v) - output)[:, FIRST_QUERY:]
        found[name] = (error.square().sum() / output[:, FIRST_QUERY:].square().sum()).item()
    return found


def kept(coded: Tensor, exact: Tensor) -> Tensor:
    """With the first tokens as they are."""
    return torch.cat([exact[:SINK], coded[SINK:]])


def covariances(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries, and of values weighted by what queries think of their keys, [D, D] float64."""
    rows, k, v = q.flatten(0, 1).double(), k.double(), v.double()
    of_queries = rows.T @ rows / len(rows)
    weights = ((k @ of_queries) * k).sum(1, keepdim=True)
    return of_queries, (v * weights).T @ v / weights.sum()


def eigenvectors(covariance: Tensor) -> Tensor:
    found: Tensor = torch.linalg.eigh(covariance).eigenvectors
    return found.float()


def coded(x: Tensor, basis: Tensor, within: float) -> Tensor:
    """x [T, D] through the codec in the coordinates of an orthonormal basis."""
    codec = Oscar(BITS, BITS, within)
    codes, scale = codec.encode_rows(x @ basis, BITS)
    return codec.decode_rows(codes, scale, x.shape[1], BITS) @ basis.T


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Logarithms of causal attention, [R, T, T]."""
    every = q @ k.T / k.shape[1] ** 0.5
    hidden = torch.ones(len(k), len(k), dtype=torch.bool).triu(1)
    return every.masked_fill(hidden, float("-inf")).log_softmax(-1)


def turned(x: Tensor, frequencies: Tensor, sign: int) -> Tensor:
    """x [T, D] with RoPE of positions from 0 done (1) or undone (-1)."""
    angles = torch.arange(len(x)).unsqueeze(1) * frequencies
    cos, sin = angles.cos().repeat(1, 2), sign * angles.sin().repeat(1, 2)
    low, high = x.chunk(2, dim=1)
    return x * cos + torch.cat([-high, low], dim=1) * sin


if __name__ == "__main__":
    main()
