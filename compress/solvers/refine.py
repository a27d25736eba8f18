"""Improve a quantized weight in place of its grid: scales in closed form, codes by coordinate descent.

Everything is columns first (`[columns, rows]`), and lowers the loss `δᵀ H δ`, δ = q - v, of every row or leaves it
(with a metric over the rows, that of every block of rows). A moment in bfloat16 makes products in bfloat16: they carry
differences, so that a proposal is off by less than a hundredth of a rounding step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .grid import Grid, nearest_levels
from .row_metric import Metric, settle, times_blocks
from .sweep import LEAF, compiles, halves

_BLOCK = 128  # columns whose gradient is computed in one GEMM, if a group is not wider


def row_losses(delta: Tensor, moment: Tensor) -> Tensor:
    """`δᵀ H δ` of every row: `[columns, rows]` → `[rows]`."""
    return torch.linalg.vecdot((moment @ delta.to(moment.dtype)).to(delta.dtype), delta, dim=0)


def differences(codes: Tensor, grid: Grid, target: Tensor) -> Tensor:
    """`grid.values(codes) - target`, all columns first."""
    span = grid.rounding.span(len(codes))
    delta = codes.clone()
    for g, scale in enumerate(grid.scales.T):
        part = delta[g * span : (g + 1) * span]
        if grid.zeros is not None:
            part -= grid.zeros[:, g]
        part.mul_(scale)
    return delta.sub_(target)


def refine(codes: Tensor, delta: Tensor, grid: Grid, moment: Tensor, keep: Tensor | None = None) -> Grid:
    """One round over the groups: the best scale with all else fixed, then every code in turn.

    Args:
        codes: `[columns, rows]`, as floats; overwritten.
        delta: `grid.values(codes) - target`, alike; overwritten.
        grid: of the codes.
        moment: H `[columns, columns]`.
        keep: bool like codes, false where a code is to stay the zero it is; None for nowhere.

    Returns:
        The grid with its new scales.
    """
    columns = codes.shape[0]
    span = grid.rounding.span(columns)
    scales, zeros = grid.turned()
    coarse = delta.to(moment.dtype)
    chunk = span * max(1, _BLOCK // span)
    for start in range(0, columns, chunk):
        part = slice(start, min(start + chunk, columns))
        gradient = (moment[part] @ coarse).to(delta.dtype)
        refine_chunk(part, codes, delta[part], gradient, (scales, zeros), grid, moment[part, part], keep)
        coarse[part] = delta[part]
    return grid.moved(scales.T.contiguous(), None if zeros is None else zeros.T.contiguous())


def refine_chunk(
    part: slice,
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    shared: tuple[Tensor, Tensor | None],
    grid: Grid,
    moment: Tensor,
    keep: Tensor | None = None,
    metric: Metric | None = None,
) -> None:
    """The same within some columns that begin with a group.

    With g the gradient `H δ M` (half of it, strictly), the best value of column j is `q_j - g_j / (H_jj m)`, rounded
    to the grid; the best scale of a group whose centred codes are k is `s - kᵀ g / (kᵀ H k m)`; m is the row's entry on
    the diagonal of M.

    Args:
        part: the columns; of the following, only values, gradient and moment are theirs alone.
        codes, keep: as in `refine`; codes are overwritten.
        values: what the codes stand for, or their difference to something, `[n, rows]`; overwritten.
        gradient: `[n, rows]`; overwritten.
        shared: scales `[groups, rows]`, overwritten, and zero points alike, which are where scales are nested.
    """
    span = grid.rounding.span(len(codes))
    scales, zeros = shared
    for left in range(part.start, part.stop, span):
        whole, group = slice(left, min(left + span, part.stop)), left // span
        own = slice(left - part.start, whole.stop - part.start)
        before = values[own].clone()
        zero = None if zeros is None else zeros[group]
        if grid.units is not None and zero is not None:
            _move_nested(codes[whole], values[own], gradient[own], scales[group], zero, moment[own, own], grid, group)
        elif grid.rounding.rows == 1:
            centred, store = codes[whole] if zero is None else codes[whole] - zero, partial(grid.storable, group=group)
            change = best_scale(scales[group], centred, gradient[own], moment[own, own], store, metric)
            scales[group] += change
            moved = centred * change
            values[own] += moved
            gradient[own].add_(times(moment[own, own], moved if metric is None else times_blocks(moved, metric.blocks)))
        kept = None if keep is None else keep[whole]
        state = codes[whole], values[own], gradient[own]
        _descend(*state, scales[group], zero, moment[own, own], grid, kept, metric)
        if own.stop < len(values):
            moved = values[own] - before
            moved = moved if metric is None else times_blocks(moved, metric.blocks)
            gradient[own.stop :].add_(times(moment[own.stop :, own], moved))


def times(moment: Tensor, matrix: Tensor) -> Tensor:
    """`moment @ matrix`, multiplied in the moment's dtype."""
    return (moment @ matrix.to(moment.dtype)).to(matrix.dtype)


def best_scale(
    scale: Tensor,
    centred: Tensor,
    gradient: Tensor,
    moment: Tensor,
    store: Callable[[Tensor], Tensor],
    metric: Metric | None = None,
) -> Tensor:
    """The change of a group's scale `[rows]` that lowers each row's loss most; `store` says how scales are read back.

    No change where the scale would move by more than half, or where, as it is stored, it would not lower the loss.
    """
    curvature = torch.linalg.vecdot(centred, times(moment, centred), dim=0)
    slope = torch.linalg.vecdot(centred, gradient, dim=0)
    weight = 1.0 if metric is None else metric.diagonal
    change = store(scale - slope / (curvature * weight)) - scale
    sane = (change.abs() < 0.5 * scale.abs()) & (change * (2 * slope + change * curvature * weight) < 0)
    change = torch.where(sane, change, 0.0)
    if metric is not None:
        moved = centred * change
        settle(moved, gradient, moment.to(moved.dtype), metric)
        change = torch.where(moved.any(0), change, 0.0)
    return change


def _move_nested(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    scale: Tensor,
    zero: Tensor,
    moment: Tensor,
    grid: Grid,
    group: int,
) -> None:
    """Give a group the best scale with what is taken away from it as it is, and the other way round, in place."""
    low, rounding = grid.rounding.numbers.low, grid.rounding
    offset = (zero - low) * scale
    counts, ones = codes - low, torch.ones_like(codes[:, :1])
    change = best_scale(scale, counts, gradient, moment, partial(grid.storable, group=group))
    moved = counts * change
    lift = times(moment, ones)
    slope = gradient.sum(0) + (lift * moved).sum(0)
    best = nearest_levels(offset + slope / lift.sum(), grid.unit(group, 1), rounding, scales=False) - offset
    best = torch.where(best * (best * lift.sum() - 2 * slope) < 0, best, 0.0)
    moved -= best
    values += moved
    gradient += times(moment, moved)
    scale += change
    zero.copy_((offset + best) / scale + low)


def _descend(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    moment: Tensor,
    grid: Grid,
    keep: Tensor | None,
    metric: Metric | None,
) -> None:
    """Set every code of a group in turn to the best one; gradients of later columns follow, in GEMMs of halves."""
    columns = codes.shape[0]
    if columns > LEAF:
        left, right = slice(halves(0, columns)), slice(halves(0, columns), columns)
        before = values[left].clone()
        kept = (None, None) if keep is None else (keep[left], keep[right])
        _descend(codes[left], values[left], gradient[left], scale, zero, moment[left, left], grid, kept[0], metric)
        moved = values[left] - before
        moved = moved if metric is None else times_blocks(moved, metric.blocks)
        gradient[right].add_(times(moment[right, left], moved))
        _descend(codes[right], values[right], gradient[right], scale, zero, moment[right, right], grid, kept[1], metric)
        return
    own = moment.to(values.dtype)
    if metric is None and compiles(values):
        from .compiled import descend_columns

        numbers, fractional = grid.rounding.numbers, grid.units is not None
        state = codes, values, gradient, own.contiguous(), scale, zero, keep
        descend_columns(*state, numbers, fractional=fractional)
        return
    for j in range(columns):
        centred = codes[j] if zero is None else codes[j] - zero
        curvature = own[j, j] if metric is None else own[j, j] * metric.diagonal
        best = torch.addcdiv(centred * scale, gradient[j], curvature, value=-1)
        code = grid.rounded(best, scale, zero)
        if keep is not None:
            code = torch.where(keep[j], code, codes[j])
        change = torch.sub(code, codes[j]).mul_(scale)
        spread = change
        if metric is not None:
            spread = settle(change[None], gradient[j : j + 1], own[j : j + 1, j : j + 1], metric)[0]
            code = torch.where(change != 0, code, codes[j])
        codes[j] = code
        values[j] += change
        if j + 1 < columns:
            gradient[j + 1 :].addr_(own[j, j + 1 :], spread)
