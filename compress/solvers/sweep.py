"""The column sweep: fix one column after another, let the columns that remain make up for the error.

GPTQ (arXiv:2210.17323, algorithm 1) and SparseGPT are this loop with different ways to fix a column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def column_sweep(
    target: Tensor, factor: Tensor, fix: Callable[[int, Tensor], Tensor], block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Minimise `tr(Δ H Δᵀ)` greedily, Δ = result - target, columns in the order given.

    Args:
        target: `[rows, columns]`.
        factor: upper triangular U with `H⁻¹ = Uᵀ U`, columns in the same order.
        fix: `(column number, its [rows] values with all corrections)` → the values to keep.
        block_size: columns between two GEMMs over all that remains; it does not change the result.

    Returns:
        `[rows, columns]` of fixed values, and `diag(Δ H Δᵀ)` `[rows]`: the sum of the squared scaled errors.
    """
    rows, columns = target.shape
    work = target.T.contiguous()  # a column is contiguous
    result = torch.empty_like(work)
    losses = torch.zeros(rows, dtype=work.dtype, device=work.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty(end - start, rows, dtype=work.dtype, device=work.device)
        for j in range(start, end):
            kept = fix(j, work[j])
            result[j] = kept
            error = torch.sub(work[j], kept, out=errors[j - start]).div_(factor[j, j])
            if j + 1 < end:
                work[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        losses += errors.square().sum(0)
        if end < columns:
            work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return result.T.contiguous(), losses
