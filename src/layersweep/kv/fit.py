"""Coordinates of keys, and values from keys, fitted to what a layer makes of a text.

Legend: N tokens, G KV heads, Q query heads, D and E the sizes of a key and a value head.

Hidden states are far from white, so weights alone (kv/basis.py) say little about which directions
keys and queries use, and nothing about what a key knows of its value: both are projections of one
hidden state. A text shows both. An error e of key t moves the score of query s by <q, e>, and the
prediction by p (1 - p) <q, e>^2 (to second order, p its attention). So with
    seen  Q = sum over s, t of p (1 - p) q q^T, q turned by their distance
    keys  C = sum over t of w k k^T around the mean, w the sum over s of p (1 - p)
an error that is even in the coordinates of `even` costs least. With S the covariance of all keys
and values of a layer
    P = (S_kk + noise)^-1 S_kv
predicts a token's values from its decoded keys. The cache stores keys, and what they leave of
values: on real models a quarter to a half of the variance.

Nothing more is stored: whoever has the model and the text can fit again. The text is the package's
own (text/reference.txt), never one that is measured. A thousand tokens are few for a thousand
directions, so a share of white hidden states is added to S. Best linear prediction: Wiener (1949).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layersweep.kv.basis import FLOOR, Basis, square_roots

WHITE = 0.3  # white hidden states' share of the variance, keys and values each
NOISE = 0.03  # of decoded keys, against their variance in their coordinates
SEEN_FLOOR = 0.1  # of the mean, for directions that no query looks at


@dataclass(frozen=True, eq=False)
class Prediction:
    """`weight` [G D, G E]: all values of a token from all of its keys; float32, or on a GPU in the
    keys' own dtype. Writers and readers of a cache predict from the same decoded keys."""

    weight: Tensor

    def values(self, k_BGTD: Tensor) -> Tensor:
        """Keys before RoPE -> [B, G, T, E] float32."""
        batch, heads, tokens, _ = k_BGTD.shape
        rows = k_BGTD.transpose(1, 2).reshape(batch * tokens, -1)
        return product(rows, self.weight).view(batch, tokens, heads, -1).transpose(1, 2)

    def left(self, v_BGTE: Tensor, k_BGTD: Tensor) -> Tensor:
        """Of values, float32, what their keys do not say."""
        said = self.values(k_BGTD)
        return torch.sub(v_BGTE, said, out=said.new_empty(said.shape))


@dataclass(frozen=True, eq=False)
class Fit:
    """Of one layer: coordinates of its keys, and what they say of its values."""

    keys: Basis
    values: Prediction


def fit(k_GND: Tensor, v_GNE: Tensor, weight_GN: Tensor, seen_GDD: Tensor, white: Tensor) -> Fit:
    """Keys before RoPE, values, and what queries make of the keys, see the module's text; `white`
    [G D + G E, H] makes keys and values of hidden states. Does not wait for their device."""
    k, v = _centred(k_GND), _centred(v_GNE)
    # on a GPU halves meet in tensor cores, ten times as fast
    operand = torch.float32 if k_GND.device.type == "cpu" else k_GND.dtype
    weighted = k * weight_GN.double().unsqueeze(2)
    basis = even(k.transpose(1, 2) @ weighted, seen_GDD.double())
    weight = _prediction(k, v, white, basis, operand)
    return Fit(basis, Prediction(weight.to(operand).contiguous()))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two or three dimensions, float32; on a GPU operands of 16 bits stay that."""
    if a.device.type == "cpu" or torch.float32 in (a.dtype, b.dtype):
        return a.float() @ b.float()
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def even(covariance: Tensor, seen: Tensor) -> Basis:
    """[G, D, D] float64 each -> the coordinates in which an even error costs least, as in
    kv/basis.py; L is the root of `seen`."""
    dim = covariance.shape[1]
    eye = torch.eye(dim, dtype=torch.float64, device=covariance.device)
    look, inverse_look = square_roots(
        _unit(seen) + SEEN_FLOOR * eye, SEEN_FLOOR, dim * (1 + SEEN_FLOOR)
    )
    most = dim * (1 + FLOOR)
    root, _ = square_roots(_unit(look @ covariance @ look) + FLOOR * eye, FLOOR, most)
    fourth, inverse_fourth = square_roots(root, FLOOR**0.5, most**0.5)
    into, back = look @ inverse_fourth, fourth @ inverse_look
    return Basis(into.float().contiguous(), back.float().contiguous())


def _prediction(
    k_GND: Tensor, v_GNE: Tensor, white: Tensor, basis: Basis, operand: torch.dtype
) -> Tensor:
    """P [G D, G E]. The noise of decoded keys is even in their coordinates."""
    size, tokens = k_GND.shape[0] * k_GND.shape[2], k_GND.shape[1]
    x = torch.cat((_columns(k_GND), _columns(v_GNE)), dim=1)
    covariance = x.T @ x / tokens
    rows = torch.cat((_share(white[:size], k_GND), _share(white[size:], v_GNE))).to(operand)
    covariance = covariance + product(rows, rows.T).double()
    variance = (k_GND @ basis.into.double()).square().mean((1, 2))
    back = basis.back.double()
    noise = NOISE * variance.view(-1, 1, 1) * (back.transpose(1, 2) @ back)
    heads = covariance[:size, :size].view(*noise.shape[:2], *noise.shape[:2])
    heads.diagonal(dim1=0, dim2=2).add_(noise.permute(1, 2, 0))
    factor = torch.linalg.cholesky_ex(covariance[:size, :size])[0]
    return torch.cholesky_solve(covariance[:size, size:], factor)


def _share(white: Tensor, x_GND: Tensor) -> Tensor:
    """`white` [G D, H] scaled: what it makes of white states has a share of the variance of x."""
    ratio = x_GND.square().sum((0, 2)).mean() / white.double().square().sum().clamp(min=1e-30)
    return white * (WHITE * ratio).sqrt().to(white.dtype)


def _centred(x_GND: Tensor) -> Tensor:
    x = x_GND.double()
    return x - x.mean(1, keepdim=True)


def _columns(x_GND: Tensor) -> Tensor:
    return x_GND.transpose(0, 1).reshape(x_GND.shape[1], -1)


def _unit(matrix: Tensor) -> Tensor:
    """Divided by the mean of its diagonal."""
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    return matrix / mean.view(-1, 1, 1)
