"""Improve a quantized weight in place of its grid: scales in closed form, codes by coordinate descent.

Everything is columns first (`[columns, rows]`), and lowers the loss `δᵀ H δ`, δ = q - v, of every row or leaves it.
A moment in bfloat16 makes products in bfloat16: they carry differences, so that a proposal is off by less than a
hundredth of a rounding step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid, group_span, round_to_grid, storable
from .sweep import LEAF, halves

_BLOCK = 128  # columns whose gradient is computed in one GEMM, if a group is not wider


def row_losses(delta: Tensor, moment: Tensor) -> Tensor:
    """`δᵀ H δ` of every row: `[columns, rows]` → `[rows]`."""
    return torch.linalg.vecdot((moment @ delta.to(moment.dtype)).to(delta.dtype), delta, dim=0)


def differences(codes: Tensor, grid: Grid, target: Tensor) -> Tensor:
    """`grid.values(codes) - target`, all columns first."""
    span = group_span(grid.group_size, len(codes))
    delta = codes.clone()
    for g, scale in enumerate(grid.scales.T):
        part = delta[g * span : (g + 1) * span]
        if grid.zeros is not None:
            part -= grid.zeros[:, g]
        part.mul_(scale)
    return delta.sub_(target)


def refine(codes: Tensor, delta: Tensor, grid: Grid, moment: Tensor) -> Grid:
    """One round over the groups: the best scale with all else fixed, then every code in turn.

    With g the gradient `H δ` (half of it, strictly), the best value of column j is `q_j - g_j / H_jj`, rounded to the
    grid; the best scale of a group whose centred codes are k is `s - kᵀ g / kᵀ H k`.

    Args:
        codes: `[columns, rows]`, as floats; overwritten.
        delta: `grid.values(codes) - target`, alike; overwritten.
        grid: of the codes.
        moment: H `[columns, columns]`.

    Returns:
        The grid with its new scales.
    """
    columns = codes.shape[0]
    span = group_span(grid.group_size, columns)
    scales = grid.scales.T.contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    coarse = delta.to(moment.dtype)
    block = span * max(1, _BLOCK // span)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        gradient = (moment[start:end] @ coarse).to(delta.dtype)
        for left in range(start, end, span):
            right = min(left + span, end)
            part, own = slice(left, right), gradient[left - start : right - start]
            before = delta[part].clone()
            zero = None if zeros is None else zeros[left // span]
            centred = codes[part] if zero is None else codes[part] - zero
            change, curved = best_scale(scales[left // span], centred, own, moment[part, part], grid.stored)
            scales[left // span] += change
            delta[part].addcmul_(centred, change)
            own.addcmul_(curved, change)
            _descend(codes[part], delta[part], own, scales[left // span], zero, moment[part, part], grid)
            if right < end:
                moved = (delta[part] - before).to(moment.dtype)
                gradient[right - start :].add_(moment[right:end, part] @ moved)
        coarse[start:end] = delta[start:end]
    return grid.with_scales(scales.T.contiguous())


def best_scale(
    scale: Tensor, centred: Tensor, gradient: Tensor, moment: Tensor, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The change of a group's scale `[rows]` that lowers each row's loss most, and `H k` `[columns, rows]`.

    No change where the scale would move by more than half, or where, rounded to `stored`, it would not lower the loss.
    """
    curved = (moment @ centred.to(moment.dtype)).to(centred.dtype)
    curvature, slope = torch.linalg.vecdot(centred, curved, dim=0), torch.linalg.vecdot(centred, gradient, dim=0)
    change = storable(scale - slope / curvature, stored) - scale
    sane = (change.abs() < 0.5 * scale.abs()) & (change * (2 * slope + change * curvature) < 0)
    return torch.where(sane, change, 0.0), curved


def _descend(
    codes: Tensor, delta: Tensor, gradient: Tensor, scale: Tensor, zero: Tensor | None, moment: Tensor, grid: Grid
) -> None:
    """Set every code of a group in turn to the best one; gradients of later columns follow, in GEMMs of halves."""
    columns = codes.shape[0]
    if columns > LEAF:
        left, right = slice(halves(0, columns)), slice(halves(0, columns), columns)
        before = delta[left].clone()
        _descend(codes[left], delta[left], gradient[left], scale, zero, moment[left, left], grid)
        gradient[right].add_(moment[right, left] @ (delta[left] - before).to(moment.dtype))
        _descend(codes[right], delta[right], gradient[right], scale, zero, moment[right, right], grid)
        return
    own = moment.to(delta.dtype)
    for j in range(columns):
        centred = codes[j] if zero is None else codes[j] - zero
        best = torch.addcdiv(centred * scale, gradient[j], own[j, j], value=-1)
        code = round_to_grid(best, scale, zero, grid.low, grid.high)
        change = torch.sub(code, codes[j]).mul_(scale)
        codes[j] = code
        delta[j] += change
        if j + 1 < columns:
            gradient[j + 1 :].addr_(own[j, j + 1 :], change)
