"""The linear system behind every data-aware pass: a damped second moment and its factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TOGETHER = 32  # columns whose order is found at a time
_LEAF = 256  # columns of a triangle that is inverted at once
_AHEAD = 512  # columns between two times that what is left of all others is worked out
# Share of squares, off the diagonal, in that of the trace. At .97, 4-bit codes found with products of bfloat16 lose
# .6 % more (damping .01), at .999 3 %, with a damping of 1e-4 three times as much; at .9 nothing.
_ALONG_ONE = 0.9


@dataclass(frozen=True)
class System:
    """A second moment made safe to solve with.

    Attributes:
        moment: `[n, n]` damped, dead inputs decoupled.
        order: int64 `[n]`, the order in which columns are to be processed.
        factor: upper triangular U with `moment[order][:, order]⁻¹ = Uᵀ U`.
        damping: the share of the mean diagonal that was added in the end.
    """

    moment: Tensor
    order: Tensor
    factor: Tensor
    damping: float

    def to(self, dtype: torch.dtype) -> System:
        """For products in a dtype; float32 where one of fewer digits would lose what is not along one direction of many
        columns, which is next to all that there is."""
        if dtype.itemsize < 4 and self._along_one():
            dtype = torch.float32
        return System(self.moment.to(dtype), self.order, self.factor.to(dtype), self.damping)

    def _along_one(self) -> bool:
        """Whether nearly all of the moment is one direction; a single column, whose products are apart from others',
        is none."""
        squares = torch.linalg.vector_norm(self.moment) ** 2 - torch.linalg.vector_norm(self.moment.diagonal()) ** 2
        return float(squares) > _ALONG_ONE * float(self.moment.trace()) ** 2

    def solve_right(self, matrix: Tensor) -> Tensor:
        """`matrix @ moment⁻¹` for `[rows, n]`, in the system's dtype.

        In bfloat16, what rounding adds stays small in the metric of the moment, for `U H Uᵀ` is the identity.
        """
        solved = torch.empty(matrix.shape, dtype=self.factor.dtype, device=matrix.device)
        solved[:, self.order] = (matrix[:, self.order].to(self.factor.dtype) @ self.factor.T) @ self.factor
        return solved


class NotSolvable(Exception):
    """The moment has non-finite entries, or stays indefinite whatever is added to its diagonal."""


def damped_system(
    moment: Tensor, damping: float = 0.01, *, act_order: bool = False, together: int = 1, shrinkage: float = 0.0
) -> System:
    """Damp, factor and invert a second moment.

    The damping is a share of the mean diagonal (GPTQ, arXiv:2210.17323 §3.3); when the factorization, done in float64,
    fails, it is multiplied by ten, up to one hundred times the mean diagonal.

    Args:
        moment: `[n, n]`, symmetric, positive semi-definite up to rounding; the result has its dtype.
        damping: the first share tried.
        act_order: process columns in the order of `sorted_order` instead of from left to right.
        together: so many neighbours stay together, and are ordered by their sum on the diagonal.
        shrinkage: how far the moment is moved to its diagonal first, which few tokens tell better than the rest (a
            target of Ledoit and Wolf's, 2004); 1: all the way.

    Raises:
        NotSolvable: see there.
    """
    if not torch.isfinite(moment).all():
        raise NotSolvable("the second moment has non-finite entries")
    base = moment.clone()
    diagonal = base.diagonal()
    if shrinkage:
        kept = diagonal.clone()
        base.mul_(1 - shrinkage)
        diagonal.copy_(kept)
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    if dead.any():  # decoupled: such columns are rounded to nearest and nothing leans on them
        base[dead, :] = 0
        base[:, dead] = 0  # what is added below is all that they weigh
    order = torch.arange(base.shape[0], device=base.device)
    if act_order and together > 1:
        first = torch.argsort(diagonal.view(-1, together).sum(1), descending=True, stable=True) * together
        order = (first[:, None] + torch.arange(together, device=base.device)).flatten()
    share, added = damping, 0.0
    while share <= 100:
        diagonal.add_((share - added) * mean)  # a view of base
        added = share
        if act_order and together == 1:
            order = sorted_order(base)
        factor = inverse_factor(base, order)
        if factor is not None:
            return System(base, order, factor, share)
        share = max(share * 10, 1e-6)
    raise NotSolvable("the second moment is not positive definite")


def sorted_order(moment: Tensor) -> Tensor:
    """An order of columns in which little is left of each that those behind it do not tell, int64 `[n]`.

    The last one is the smallest, the one before it the smallest in what the last does not tell of it, and so on: the
    sorted QR decomposition of decoders of lattices (Wübben et al., 2001), several columns at a time, which stay in the
    order of their size.

    Args:
        moment: `[n, n]`, positive definite.
    """
    columns = torch.arange(len(moment), device=moment.device)
    rest, found = moment, list[Tensor]()
    while len(columns):
        energy, told = rest.diagonal().clone(), rest.new_zeros(min(_AHEAD, len(rest)), len(rest))
        waiting = torch.ones_like(columns, dtype=torch.bool)
        for start in range(0, len(told), _TOGETHER):
            taken = energy.argsort(stable=True)[: min(_TOGETHER, len(told) - start)]
            found.append(columns[taken])
            own = rest[taken].addmm_(told[:start, taken].T, told[:start], alpha=-1)
            factor, info = torch.linalg.cholesky_ex(own[:, taken])
            if int(info) == 0 and bool(
                (rows := torch.linalg.solve_triangular(factor, own, upper=False)).isfinite().all()
            ):
                told[start : start + len(taken)] = rows
                energy -= rows.square().sum(0)
            waiting[taken], energy[taken] = False, torch.inf
        left = waiting.nonzero()[:, 0]
        columns, told = columns[left], told[:, left]
        rest = rest[left][:, left].addmm_(told.T, told, alpha=-1)
    return torch.cat(found).flip(0)


def inverse_factor(matrix: Tensor, order: Tensor) -> Tensor | None:
    """Upper triangular U with `matrix[order][:, order]⁻¹ = Uᵀ U`, or None if the matrix is not positive definite.

    One Cholesky of the matrix read backwards gives `M Mᵀ` with M upper triangular, and U = M⁻¹. The matrix needs the
    digits of float64; M, whose condition is the square root of the matrix's, is inverted in the matrix's dtype.
    """
    backwards = order.flip(0)
    lower, info = torch.linalg.cholesky_ex(matrix[backwards[:, None], backwards].double())
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        return None
    upper = lower.to(matrix.dtype).flip(0, 1)
    del lower  # at this size every copy counts
    inverse = torch.zeros_like(upper)
    _invert(upper, inverse)
    return inverse


def _invert(upper: Tensor, inverse: Tensor) -> None:
    """The inverse of an upper triangular matrix, into zeros: by halves, in a third of the operations of a solver that
    takes the identity for any matrix."""
    size = len(upper)
    if size <= _LEAF:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        inverse.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    first, second = slice(size // 2), slice(size // 2, size)
    _invert(upper[first, first], inverse[first, first])
    _invert(upper[second, second], inverse[second, second])
    torch.mm(inverse[first, first] @ upper[first, second], inverse[second, second].neg(), out=inverse[first, second])
