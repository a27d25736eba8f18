"""The column sweep: fix one column after another, let the columns that remain make up for the error.

GPTQ (arXiv:2210.17323, algorithm 1) and SparseGPT are this loop with different ways to fix a column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAF = 32  # columns that hand on their errors one by one; beyond, halves hand on theirs in one GEMM


def halves(start: int, end: int) -> int:
    """Where a range of more than `LEAF` columns is cut: at a multiple of `LEAF` from its start."""
    return start + LEAF * -(-(end - start) // (2 * LEAF))


def column_sweep(work: Tensor, factor: Tensor, fix: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Minimise `tr(Δ H Δᵀ)` greedily, Δ = kept - target, columns in the order given.

    The error of the first half of the columns is handed on to the second in one GEMM, halves within halves alike:
    the result is that of handing on column by column.

    Args:
        work: the target, columns first: `[columns, rows]`. Overwritten.
        factor: upper triangular U with `H⁻¹ = Uᵀ U`, columns in the same order. In bfloat16, products are made in
            bfloat16: what is handed on is then off by less than a hundredth of a rounding step.
        fix: `(column number, its [rows] values with all corrections)` → the values kept in their place.

    Returns:
        `diag(Δ H Δᵀ)`, `[rows]`: the sum of the squared scaled errors.
    """
    losses = torch.zeros_like(work[0])
    _sweep(work, 0, work.shape[0], factor, fix, losses)
    return losses


# Not a function within the other: one that calls itself is a cycle, which keeps its tensors until it is collected.
def _sweep(
    work: Tensor, start: int, end: int, factor: Tensor, fix: Callable[[int, Tensor], Tensor], losses: Tensor
) -> None:
    if end - start > LEAF:
        middle = halves(start, end)
        _sweep(work, start, middle, factor, fix, losses)
        work[middle:end].sub_(factor[start:middle, middle:end].T @ work[start:middle].to(factor.dtype))
        _sweep(work, middle, end, factor, fix, losses)
        return
    own = factor[start:end, start:end].to(work.dtype)
    for j in range(start, end):
        error = work[j].sub_(fix(j, work[j])).div_(own[j - start, j - start])
        if j + 1 < end:
            work[j + 1 : end].addr_(own[j - start, j - start + 1 :], error, alpha=-1)
    losses.add_(work[start:end].square().sum(0))
