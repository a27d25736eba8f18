"""The best matrix of a given rank, in the metric of a second moment; and latents that are easy to round."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.fft import dct
from torch import Tensor

_DAMPING = 1e-4  # of the mean diagonal, added to a metric: no error is free


def best_low_rank(matrix: Tensor, moment: Tensor, rank: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`min tr((M - U D) H (M - U D)ᵀ)` over U `[rows, rank]` and D `[rank, columns]`.

    The leading eigenvectors of `M H Mᵀ` are the left singular vectors of `M H^½`, hence U; then `D = Uᵀ M`. Where
    columns are fewer than rows, the same from the right: with `H = L Lᵀ`, V the leading eigenvectors of `(M L)ᵀ M L`,
    `U = M L V` and `D = Vᵀ L⁻¹`.

    Args:
        matrix: M `[rows, columns]`.
        moment: H `[columns, columns]`, positive definite.
        metric: G `[rows, rows]`, positive definite, where `tr(G (M - U D) H (M - U D)ᵀ)` is meant: with `G = L Lᵀ`, the
            solution for `Lᵀ M`, its U times `L⁻ᵀ`.

    Returns:
        U and D in the matrix's dtype; eigenvectors are computed in float64.
    """
    if metric is not None:
        root = torch.linalg.cholesky(metric.double())
        up, down = best_low_rank(root.T @ matrix.double(), moment, rank)
        return torch.linalg.solve_triangular(root.T, up, upper=True).to(matrix.dtype), down.to(matrix.dtype)
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


@dataclass(frozen=True)
class Components:
    """Principal components of a projection's outputs, by groups of rows.

    Attributes:
        weight: `Lᵀ W` `[groups, rows / groups, columns]`, float64.
        root: L `[groups, rows / groups, rows / groups]`, `M = L Lᵀ` being how much errors of the outputs matter.
        values, vectors: of `Lᵀ W H Wᵀ L`, by falling value: `[groups, n]` and `[groups, n, n]`.
    """

    weight: Tensor
    root: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor | None, metric: Tensor | None, groups: int) -> Components:
        """
        Args:
            weight: `[rows, columns]`.
            moment: H `[columns, columns]`; None for the identity.
            metric: M `[rows, rows]`, positive semi-definite, of which blocks count; None for the identity.
        """
        parts = weight.double().unflatten(0, (groups, -1))
        root = torch.eye(parts.shape[1], dtype=torch.float64, device=weight.device).expand(groups, -1, -1)
        if metric is not None:
            blocks = metric.double().view(groups, parts.shape[1], groups, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            damping = _DAMPING * blocks.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
            root = torch.linalg.cholesky(blocks + damping[:, None, None] * root)
        scaled = root.mT @ parts
        seen = scaled if moment is None else scaled @ moment.double()
        values, vectors = torch.linalg.eigh(seen @ scaled.mT)
        return cls(scaled, root, values.flip(-1).clamp(min=0), vectors.flip(-1))

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """float32 `up` `[rows, rank / groups]` and `down` `[rank, columns]` of the best product.

        `tr((W - up down)ᵀ M (W - up down) H)` is the sum of the values left out. Of all factors of that product, those
        whose `up` has orthonormal columns and whose latents are the principal components of what is kept, largest
        first: factors in the metric's own basis can differ by orders of magnitude, which integers cannot follow.
        """
        each = rank // len(self.values)
        vectors = self.vectors[..., :each]
        up = torch.linalg.solve_triangular(self.root.mT, vectors, upper=True)
        basis = torch.linalg.svd(up * self.values[:, None, :each].sqrt(), full_matrices=False).U
        down = (basis.mT @ up) @ (vectors.mT @ self.weight)
        return basis.flatten(0, 1).float(), down.flatten(0, 1).float()

    def tail(self) -> Tensor:
        """float64 `[rows + 1]`: what is lost when so many channels are kept, the same in each group."""
        groups = len(self.values)
        kept = (self.values.sum(0) / groups).repeat_interleave(groups)
        return torch.cat([kept.flip(0).cumsum(0).flip(0), kept.new_zeros(1)])


def rotation(rank: int, split: int, groups: int) -> Tensor:
    """Orthogonal `[rank, rank]`, in blocks that cross neither groups nor multiples of `split`: cosine transforms, which
    spread a few large channels over all of their block, so that one scale serves it."""
    ends = sorted({*range(0, rank, split), *range(0, rank + 1, rank // groups)})
    sizes = [end - start for start, end in pairwise(ends)]
    return torch.block_diag(*(torch.from_numpy(dct(torch.eye(n).numpy(), axis=0, norm="ortho")) for n in sizes))
