"""The column sweep: fix one column after another, let the columns that remain make up for the error.

GPTQ (arXiv:2210.17323, algorithm 1) and SparseGPT are this loop with different ways to fix a column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .grid import Grid
from .system import System

LEAF = 32  # columns that hand on their errors one by one; beyond, halves hand on theirs in one GEMM


def halves(start: int, end: int) -> int:
    """Where a range of more than `LEAF` columns is cut: at a multiple of `LEAF` from its start."""
    return start + LEAF * -(-(end - start) // (2 * LEAF))


def compiles(tensor: Tensor) -> bool:
    """Whether loops over a tensor's numbers are compiled (`compiled.py`), and not left to torch."""
    return tensor.device.type == "cpu"


# Fixes columns from one to another of `work`, each by what is left of it, and leaves their errors over the diagonal of
# the factor `[n, n]` of these columns in the place of them.
Fixing = Callable[[int, int, Tensor, Tensor], None]


def by_column(fix: Callable[[int, Tensor], Tensor]) -> Fixing:
    """One column after the other.

    Args:
        fix: `(column number, its [rows] values with all corrections)` → the values kept in their place.
    """

    def fixed(start: int, end: int, work: Tensor, own: Tensor) -> None:
        for j in range(start, end):
            error = work[j].sub_(fix(j, work[j])).div_(own[j - start, j - start])
            if j + 1 < end:
                work[j + 1 : end].addr_(own[j - start, j - start + 1 :], error, alpha=-1)

    return fixed


def column_sweep(work: Tensor, factor: Tensor, fix: Fixing) -> Tensor:
    """Minimise `tr(Δ H Δᵀ)` greedily, Δ = kept - target, columns in the order given.

    The error of the first half of the columns is handed on to the second in one GEMM, halves within halves alike:
    the result is that of handing on column by column.

    Args:
        work: the target, columns first: `[columns, rows]`. Overwritten.
        factor: upper triangular U with `H⁻¹ = Uᵀ U`, columns in the same order. In bfloat16, products are made in
            bfloat16: what is handed on is then off by less than a hundredth of a rounding step.
        fix: what becomes of some columns.

    Returns:
        `diag(Δ H Δᵀ)`, `[rows]`: the sum of the squared scaled errors.
    """
    losses = torch.zeros_like(work[0])
    _sweep(work, 0, work.shape[0], factor, fix, losses)
    return losses


# Not a function within the other: one that calls itself is a cycle, which keeps its tensors until it is collected.
def _sweep(work: Tensor, start: int, end: int, factor: Tensor, fix: Fixing, losses: Tensor) -> None:
    if end - start > LEAF:
        middle = halves(start, end)
        _sweep(work, start, middle, factor, fix, losses)
        work[middle:end].sub_(factor[start:middle, middle:end].T @ work[start:middle].to(factor.dtype))
        _sweep(work, middle, end, factor, fix, losses)
        return
    fix(start, end, work, factor[start:end, start:end].to(work.dtype))
    losses.add_(work[start:end].square().sum(0))


def best_sweep(
    target: Tensor, grids: Sequence[Grid], system: System, at_once: int, keep: Tensor | None = None
) -> tuple[Grid, Tensor, Tensor]:
    """Sweep on each grid; every row keeps the scales, zeros and codes of its lowest loss.

    Args:
        target: columns first, `[columns, rows]`.
        at_once: rows of all grids together that are swept side by side.
        keep: bool like the target, false where a zero is to stay.

    Returns:
        Grid, codes `[columns, rows]` (as floats) and losses `[rows]`.
    """
    found = []
    at_once = max(1, at_once // len(grids))
    for start in range(0, target.shape[1], at_once):
        rows = slice(start, min(start + at_once, target.shape[1]))
        stacked = Grid.stacked([grid.rows(rows) for grid in grids])
        codes, losses = gptq_codes(target[:, rows], stacked, system, None if keep is None else keep[:, rows])
        count = rows.stop - rows.start
        best = losses.view(len(grids), count).argmin(0) * count + torch.arange(count, device=losses.device)
        found.append((stacked.rows(best), codes[:, best], losses[best]))
    chosen, swept, lowest = zip(*found, strict=True)
    return Grid.stacked(chosen), torch.cat(swept, 1), torch.cat(lowest)


def gptq_codes(target: Tensor, grid: Grid, system: System, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (as floats) of the column sweep on a static grid, in the system's order, and row losses.

    Args:
        target: columns first, `[columns, rows]`.
        grid: of these rows, or of several times as many: each of the stacked grids is swept.
        keep: bool like the target, false where a zero is to stay; None for nowhere.

    Returns:
        `[columns, rows of the grid]` and `[rows of the grid]`.
    """
    columns, rows = target.shape
    span = grid.rounding.span(columns)
    scales = grid.scales.T.contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    copies = grid.scales.shape[0] // rows
    work = target[system.order].repeat(1, copies)
    codes = torch.empty_like(work)
    places = system.order.tolist()

    def fix(j: int, column: Tensor) -> Tensor:
        place = places[j]
        scale, zero = scales[place // span], None if zeros is None else zeros[place // span]
        code = grid.rounded(column, scale, zero)
        if keep is not None:
            code = torch.where(keep[place].repeat(copies), code, 0.0 if zero is None else zero)
        codes[place] = code
        return (code if zero is None else code - zero) * scale

    def fix_compiled(start: int, end: int, work: Tensor, own: Tensor) -> None:
        from .compiled import sweep_columns  # slow to import, and of no use on a GPU

        own, found, where = own.contiguous(), torch.empty_like(work[start:end]), system.order[start:end]
        kept = None if keep is None else keep[where].repeat(1, copies)
        steps, moved = scales[where // span], None if zeros is None else zeros[where // span]
        fractional = grid.units is not None
        sweep_columns(work[start:end], own, found, steps, moved, kept, grid.rounding.numbers, fractional=fractional)
        codes[where] = found

    losses = column_sweep(work, system.factor, fix_compiled if compiles(work) else by_column(fix))
    return codes, losses
