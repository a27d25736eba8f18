"""The best matrix of a given rank, in the metric of a second moment."""

from __future__ import annotations

import torch
from torch import Tensor


def best_low_rank(matrix: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`min tr((M - U D) H (M - U D)ᵀ)` over U `[rows, rank]` and D `[rank, columns]`.

    The leading eigenvectors of `M H Mᵀ` are the left singular vectors of `M H^½`, hence U; then `D = Uᵀ M`. Where
    columns are fewer than rows, the same from the right: with `H = L Lᵀ`, V the leading eigenvectors of `(M L)ᵀ M L`,
    `U = M L V` and `D = Vᵀ L⁻¹`.

    Args:
        matrix: M `[rows, columns]`.
        moment: H `[columns, columns]`, positive definite.

    Returns:
        U and D in the matrix's dtype; eigenvectors are computed in float64.
    """
    rows, columns = matrix.shape
    exact = matrix.double()
    if rows <= columns:
        vectors = torch.linalg.eigh(exact @ moment.double() @ exact.T).eigenvectors[:, -rank:]
        return vectors.to(matrix.dtype), (vectors.T @ exact).to(matrix.dtype)
    lower = torch.linalg.cholesky(moment.double())
    seen = exact @ lower
    vectors = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -rank:]
    down = torch.linalg.solve_triangular(lower, vectors.T, upper=False, left=False)
    up = seen @ vectors
    size = up.norm(dim=0).clamp(min=torch.finfo(matrix.dtype).tiny)
    return (up / size).to(matrix.dtype), (down * size[:, None]).to(matrix.dtype)


def refit_up(matrix: Tensor, moment: Tensor, down: Tensor, fallback: Tensor) -> Tensor:
    """The best U for a D that was rounded: `M H Dᵀ (D H Dᵀ)⁻¹`; the fallback if that is singular."""
    seen = (moment @ down.T).double()
    square, info = torch.linalg.cholesky_ex(down.double() @ seen)
    if int(info) != 0:
        return fallback
    return torch.cholesky_solve((matrix.double() @ seen).T, square).T.to(matrix.dtype)
