"""Coordinates for keys from weights: what they promise, and that a sweep uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from layersweep.kv import Stream, parse
from layersweep.kv.basis import FLOOR, key_basis, square_roots
from layersweep.kv.stored import StoredStream

DIM, GROUPS, HEADS, HIDDEN = 64, 2, 4, 200


def weights(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Projections whose rows differ a hundredfold in size, turned."""
    generator = torch.Generator().manual_seed(seed)

    def uneven(rows: int) -> Tensor:
        turn = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
        sizes = torch.logspace(-1, 1, rows).unsqueeze(1)
        return turn @ (sizes * torch.randn(rows, HIDDEN, generator=generator))

    norm = torch.rand(HIDDEN, generator=generator) + 0.5
    return uneven(HEADS * DIM), torch.cat([uneven(DIM) for _ in range(GROUPS)]), norm


def spread(metric: Tensor, c: Tensor, seen: Tensor) -> float:
    """How far M C M / Q is from the same in all directions."""
    directions = torch.linalg.eigvals(metric @ c @ metric / seen).real
    return (torch.quantile(directions, 0.9) / torch.quantile(directions, 0.5)).item()


def test_square_roots_equal_those_of_an_eigenvalue_solver() -> None:
    a = torch.randn(3, DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = a @ a.transpose(1, 2) / DIM + FLOOR * torch.eye(DIM, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    root, inverse = square_roots(matrix, FLOOR, matrix.diagonal(dim1=1, dim2=2).sum(1).max().item())
    wanted = vectors @ torch.diag_embed(values.sqrt()) @ vectors.transpose(1, 2)
    assert (root - wanted).abs().max() < 1e-10
    assert (root @ inverse - torch.eye(DIM, dtype=torch.float64)).abs().max() < 1e-8


def test_there_and_back_is_where_one_was() -> None:
    basis = key_basis(*weights(), DIM)
    x = torch.randn(2, GROUPS, 7, DIM)
    assert (basis.leave(basis.enter(x)) - x).abs().max() < 1e-4
    assert torch.equal(basis.enter(x.half()), x.half().float() @ basis.into)


def test_it_solves_the_equation_that_it_comes_from() -> None:
    """M C M is proportional to Q, but for the floor, which is small where C is even enough."""
    q_proj, k_proj, norm = weights()
    basis = key_basis(q_proj, k_proj, norm, DIM)
    for group in range(GROUPS):
        k = (k_proj.view(GROUPS, DIM, HIDDEN)[group] * norm).double()
        q = (q_proj.view(GROUPS, -1, 2, DIM // 2, HIDDEN)[group] * norm).double()
        seen = q.square().sum(-1).mean((0, 1)).repeat(2)
        into = basis.into[group].double()
        assert spread(torch.eye(DIM, dtype=torch.float64), k @ k.t(), seen) > 20
        assert spread(into @ into.t(), k @ k.t(), seen) < 3


def test_scores_lose_less_in_it() -> None:
    """Queries and keys as the weights make them from white hidden states, 1,000 of each."""
    q_proj, k_proj, norm = weights(3)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1000, HIDDEN, generator=generator) * norm
    k = (hidden @ k_proj.t()).view(1, 1000, GROUPS, DIM).transpose(1, 2)
    q = (hidden @ q_proj.t()).view(1, 1000, HEADS, DIM).transpose(1, 2)[:, :: HEADS // GROUPS]
    arm = parse("trellis:K2V2")
    lost = []
    for basis in (None, key_basis(q_proj, k_proj, norm, DIM)):
        stream = Stream("k", GROUPS, DIM, role="key", rope=True, basis=basis)
        coded = StoredStream.empty(arm, stream).appended(k)
        lost.append(((coded.decoded() - k) @ q.transpose(-1, -2)).square().mean().item())
        assert coded.nbits == 8 * GROUPS * (1000 * (DIM * 2 // 8 + 1) + 2 * (DIM + 1))
    assert lost[1] < 0.5 * lost[0]


def test_weights_of_zero_give_no_nan() -> None:
    q_proj, k_proj, norm = weights()
    k_proj[:DIM] = 0
    q_proj[: DIM * HEADS // GROUPS] = 0
    basis = key_basis(q_proj.half(), k_proj.half(), norm.half(), DIM)
    assert basis.into.isfinite().all() and basis.back.isfinite().all()
