"""Coordinates for keys in which an error matters alike in every direction, from weights alone.

A codec that rotates spreads its error evenly over a head vector. Keys vary far more in some
directions than in others, and queries look at some more than at others. With x' = A x, coded with
an even error and turned back, the error of scores, tr(Q E), is smallest where M = A^T A satisfies
    M C M = Q,   C the covariance of keys, Q that of queries
(minimum of tr(M C) tr(Q M^-1)). A = (L^T C L)^(-1/4) L^T with Q = L L^T is one such A.

Nothing is measured and nothing is stored: a reader of the cache has the model. Behind RMSNorm with
weights g, hidden states are taken as white, so C = W_k diag(g^2) W_k^T for each KV head. Queries
meet keys turned by every distance; of their covariance only the mean over each RoPE pair is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Of the mean variance, added to every direction: what weights do not show must not be blown up.
FLOOR = 0.01


@dataclass(frozen=True, eq=False)
class Basis:
    """into, back float32 [H, D, D]: x' = x @ into, x = x' @ back for x [B, H, T, D]."""

    into: Tensor
    back: Tensor

    def enter(self, x_BHTD: Tensor) -> Tensor:
        """The same vectors in these coordinates, float32."""
        return x_BHTD.to(torch.float32, memory_format=torch.contiguous_format) @ self.into

    def leave(self, x_BHTD: Tensor) -> Tensor:
        return x_BHTD @ self.back


def key_basis(q_proj: Tensor, k_proj: Tensor, norm: Tensor, dim: int) -> Basis:
    """q_proj [Q D, H], k_proj [G D, H], norm [H] of the layer's input, `dim` D -> Basis of G heads.

    Works on the weights' device without waiting for it.
    """
    groups, norm = len(k_proj) // dim, norm.float()
    k = (k_proj * norm).view(groups, dim, -1)
    # queries group by group: all of them in float32 would take as much memory as an expert
    squares = [(q * norm).square_().sum(1) for q in q_proj.chunk(groups)]
    seen = torch.cat(squares).view(groups, -1, 2, dim // 2).mean((1, 2)).double().repeat(1, 2)
    scale = (seen / seen.mean(1, keepdim=True).clamp(min=1e-30)).clamp(min=FLOOR).sqrt()  # L
    covariance = (k @ k.transpose(1, 2)).double() * scale.unsqueeze(2) * scale.unsqueeze(1)
    eye = torch.eye(dim, dtype=torch.float64, device=norm.device)
    variance = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    even = covariance / variance.view(-1, 1, 1) + FLOOR * eye
    most = dim * (1 + FLOOR)  # its trace
    root, _ = square_roots(even, FLOOR, most)
    fourth, inverse_fourth = square_roots(root, FLOOR**0.5, most**0.5)
    into, back = scale.unsqueeze(2) * inverse_fourth, fourth / scale.unsqueeze(1)
    return Basis(into.float().contiguous(), back.float().contiguous())


def square_roots(matrix: Tensor, least: float, most: float) -> tuple[Tensor, Tensor]:
    """Symmetric [N, D, D] float64 -> its square root and the inverse of that. Its eigenvalues are
    between `least` > 0 and `most`.

    Coupled Newton-Schulz: products alone, where an eigenvalue solver on a GPU makes the host wait
    in every layer. Higham, "Functions of Matrices" (2008), section 6; scaled by Chen and Chow, "A
    Stable Scaling of Newton-Schulz for Improving the Sign Function Computation of a Hermitian
    Matrix" (2014), which halves the steps.
    """
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    root, inverse = matrix / most, eye
    for by in _factors((least / most) ** 0.5):
        # by (3 - by^2 inverse root) / 2
        step = torch.baddbmm(eye, inverse, root, beta=1.5 * by, alpha=-0.5 * by**3)
        root, inverse = root @ step, step @ inverse
    return root * most**0.5, inverse / most**0.5


@cache
def _factors(low: float) -> list[float]:
    """What Newton-Schulz is scaled by in each step, where all that shall become 1 starts between
    `low` and 1: each step lifts both ends to the same place, the new `low`."""
    factors = []
    while 1 - low > 1e-15:
        by = (3 / (1 + low + low * low)) ** 0.5
        factors.append(by)
        low = by * low * (3 - (by * low) ** 2) / 2
    return [*factors, 1.0]
