"""Improve a quantized weight in place of its grid: scales in closed form, codes by coordinate descent.

Both lower `tr((Q - V) H (Q - V)ᵀ)` row by row and never raise it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid, by_group, group_span, round_to_grid


def row_losses(delta: Tensor, moment: Tensor) -> Tensor:
    """`diag(Δ H Δᵀ)`, `[rows]`."""
    return torch.linalg.vecdot(delta @ moment, delta)


def refit_scales(codes: Tensor, grid: Grid, moment: Tensor, pull: Tensor, rows_at_once: int = 1024) -> Grid:
    """The scales that minimise the loss for the codes as they are.

    With k the centred codes of a row, split by group, its loss is `sᵀ A s - 2 bᵀ s + const`, where
    `A_gh = k_gᵀ H_gh k_h` and `b_g = k_gᵀ (H v)_g`; the best scales are `A⁻¹ b`. A row keeps its scales if any of
    them would move by more than half, or if the rounded scales do not lower its loss.

    Args:
        codes: `[rows, columns]`, as floats.
        moment: H `[columns, columns]`.
        pull: `V H`, `[rows, columns]`, for the target V.
    """
    pieces = []
    for start in range(0, codes.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        zeros = None if grid.zeros is None else grid.zeros[rows]
        part = Grid(grid.scales[rows], zeros, grid.bits, grid.group_size, grid.stored)
        pieces.append(_refit_rows(codes[rows], part, moment, pull[rows]))
    return grid.with_scales(torch.cat(pieces))


def _refit_rows(codes: Tensor, grid: Grid, moment: Tensor, pull: Tensor) -> Tensor:
    rows, columns = codes.shape
    groups, size = grid.scales.shape[1], group_span(grid.group_size, columns)
    unit = Grid(torch.ones_like(grid.scales), grid.zeros, grid.bits, grid.group_size, grid.stored)
    centred = unit.values(codes)
    system = torch.empty(rows, groups, groups, dtype=codes.dtype, device=codes.device)
    for g in range(groups):  # symmetric: blocks on and right of the diagonal
        start, end = g * size, min((g + 1) * size, columns)
        products = (centred[:, start:end] @ moment[start:end, start:]).mul_(centred[:, start:])
        system[:, g, g:] = system[:, g:, g] = by_group(products, size).sum(2)
    right = by_group(pull * centred, size).sum(2)

    def loss(scales: Tensor) -> Tensor:
        return (((system @ scales[:, :, None])[:, :, 0] - 2 * right) * scales).sum(1)

    regular = system.clone()
    diagonal = regular.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal + torch.finfo(codes.dtype).tiny)
    solved, info = torch.linalg.solve_ex(regular, right)
    ratio = solved / grid.scales
    sane = ((ratio > 0.5) & (ratio < 1.5)).all(1) & (info == 0)
    proposal = grid.with_scales(torch.where(sane[:, None], solved, grid.scales)).scales
    return torch.where((loss(proposal) < loss(grid.scales))[:, None], proposal, grid.scales)


def coordinate_descent(target: Tensor, codes: Tensor, grid: Grid, moment: Tensor, block_size: int = 128) -> Tensor:
    """One pass over the columns, each set to the code that minimises the loss with all others fixed.

    With r the gradient `(Q - V) H`, the best value of column j is `q_j - r_j / H_jj`, rounded to the grid.

    Args:
        block_size: columns between two GEMMs that bring the gradient up to date; it does not change the result.

    Returns:
        New codes `[rows, columns]`, as floats.
    """
    columns = target.shape[1]
    scales, zeros = grid.columns(columns)
    scales, zeros = scales.T.contiguous(), None if zeros is None else zeros.T.contiguous()
    work = codes.T.contiguous()
    delta = (grid.values(codes) - target).T.contiguous()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        gradient = moment[start:end] @ delta
        for j in range(start, end):
            centred = work[j] if zeros is None else work[j] - zeros[j]
            best = torch.addcdiv(centred * scales[j], gradient[j - start], moment[j, j], value=-1)
            code = round_to_grid(best, scales[j], None if zeros is None else zeros[j], grid.low, grid.high)
            change = (code - work[j]).mul_(scales[j])
            work[j] = code
            delta[j] += change
            if j + 1 < end:
                gradient[j + 1 - start :].addr_(moment[j, j + 1 : end], change)
    return work.T.contiguous()
