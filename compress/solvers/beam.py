"""The column sweep with several choices of codes side by side: a search of the K best, as decoders of lattices have it.

Where the sweep of GPTQ fixes each code for good, a row keeps as many choices of its codes so far as the search is wide.
Each column goes on from every one of them with the two numbers on either side of what is left there, and of these the
ones of the least loss stay (Guo and Nilsson, "Algorithm and implementation of the K-best sphere decoding for MIMO
detection", 2006). With one, it is the sweep. Some dozens of columns later, codes are those that the best choice then
has, and choices that differ there end, as decoders of long codes settle what lies far behind: nearly all have come from
the same one by then, and only a few columns are carried for each choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid
from .refine import differences, refine, row_losses
from .sweep import LEAF, compiles, gptq_codes
from .system import System

_AT_ONCE = 32768  # choices of all rows together that are followed side by side


def beam_codes(target: Tensor, grid: Grid, system: System, width: int, keep: Tensor | None = None) -> Tensor:
    """Codes (as floats) on a static grid, in the system's order, of the least loss that was found for each row.

    Args:
        target: columns first, `[columns, rows]`.
        width: choices of a row.
        keep: bool like the target, false where a zero is to stay; None for nowhere.

    Returns:
        `[columns, rows]`.
    """
    if width == 1:
        return gptq_codes(target, grid, system, keep)[0]
    found, at_once = [], _AT_ONCE // width
    for start in range(0, target.shape[1], at_once):
        rows = slice(start, min(start + at_once, target.shape[1]))
        kept = None if keep is None else keep[:, rows]
        found.append(_codes(target[:, rows], grid.rows(rows), system, width, kept))
    return torch.cat(found, 1)


def carried(rows: int, width: int) -> float:
    """Bytes of what is carried for the choices of so many rows: five float32 numbers for each of `LEAF` columns."""
    return 20.0 * LEAF * min(rows * width, _AT_ONCE)


def improved(
    codes: Tensor, target: Tensor, grid: Grid, system: System, keep: Tensor | None, width: int, rounds: int
) -> tuple[Tensor, Grid]:
    """Codes and grid of lower losses than some, or these, row by row.

    Args:
        codes: columns first, `[columns, rows]`, as floats; target, keep: alike.
        rounds: of refinement.
    """
    before = row_losses(differences(codes, grid, target), system.moment)
    found = beam_codes(target, grid, system, width, keep)
    delta, better = differences(found, grid, target), grid
    for _ in range(rounds):
        better = refine(found, delta, better, system.moment, keep)
    lower = row_losses(delta, system.moment) < before  # nowhere where it is not a number
    return torch.where(lower, found, codes), better.where(lower, grid)


def _codes(target: Tensor, grid: Grid, system: System, width: int, keep: Tensor | None) -> Tensor:
    columns, rows = target.shape
    span, factor, row = grid.rounding.span(columns), system.factor, torch.arange(rows, device=target.device)
    scales, zeros = grid.turned()
    aims = target[system.order].T.contiguous()
    settled, found = factor.new_zeros(rows, columns), torch.empty_like(target)  # errors over the factor's diagonal
    losses = aims.new_full((rows, width), torch.inf)
    losses[:, 0] = 0
    recent, recent_codes = aims.new_zeros(rows, width, 0), aims.new_zeros(rows, width, 0)
    for start in range(0, columns, LEAF):
        part, before = slice(start, min(start + LEAF, columns)), max(0, start - LEAF)
        where = system.order[part]
        handed = (settled[:, :before] @ factor[:before, part])[:, None].to(aims.dtype)
        handed = handed + recent @ factor[before:start, part].to(aims.dtype)
        left = aims[:, None, part] - handed
        own = factor[part, part].to(aims.dtype).contiguous()
        offsets = None if zeros is None else zeros[where // span]
        kept = None if keep is None else keep[where]
        codes, origin = _followed(left, losses, own, scales[where // span], offsets, kept, grid)
        best = origin[row, losses.argmin(1)]
        settled[:, before:start] = recent[row, best].to(factor.dtype)
        found[system.order[before:start]] = recent_codes[row, best].T
        losses.masked_fill_(origin != best[:, None], torch.inf)
        recent, recent_codes = left, codes
    found[where] = recent_codes[row, losses.argmin(1)].T
    return found


def _followed(
    left: Tensor,
    losses: Tensor,
    own: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    keep: Tensor | None,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Follow the choices of each row through some columns.

    Args:
        left: `[rows, width, n]`, what is left of the target for each choice; becomes their errors over the diagonal.
        losses: `[rows, width]`, infinite where there is no such choice; become those of the choices that stay.
        own: `[n, n]`, these columns of the factor.
        scales, zeros, keep: of every column, `[n, rows]`.

    Returns:
        Codes `[rows, width, n]`, and int64 `[rows, width]`, which choice each came from.
    """
    if compiles(left):
        from .compiled import follow_choices  # slow to import, and of no use on a GPU

        fractional = grid.units is not None
        return follow_choices(left, losses, own, scales, zeros, keep, grid.rounding.numbers, fractional=fractional)
    rows, width, columns = left.shape
    codes, numbers = torch.zeros_like(left), grid.rounding.numbers
    origin = torch.arange(width, device=left.device).expand(rows, width)
    for j in range(columns):
        scale, zero = scales[j][:, None], None if zeros is None else zeros[j][:, None]
        code = grid.rounded(left[:, :, j], scale, zero)
        exact = left[:, :, j] / scale if zero is None else left[:, :, j] / scale + zero
        other = numbers.beside(exact, code)
        if keep is not None:
            none = torch.zeros_like(code) if zero is None else zero.expand_as(code)
            code, other = (torch.where(keep[j][:, None], part, none) for part in (code, other))
        both = torch.stack([code, other], 2)
        centred = both if zero is None else both - zero[:, :, None]
        errors = (left[:, :, j, None] - centred * scale[:, :, None]) / own[j, j]
        found = losses[:, :, None] + errors.square()
        found[:, :, 1].masked_fill_(other == code, torch.inf)
        least, which = found.flatten(1).sort(stable=True)
        losses.copy_(least[:, :width])
        which = which[:, :width]
        come, error = which // 2, errors.flatten(1).gather(1, which)
        error = torch.where(losses < torch.inf, error, 0.0)
        wide = come[:, :, None].expand_as(left)
        left.copy_(left.gather(1, wide))
        codes = codes.gather(1, wide)
        codes[:, :, j] = both.flatten(1).gather(1, which)
        origin = origin.gather(1, come)
        left[:, :, j] = error
        left[:, :, j + 1 :] -= error[:, :, None] * own[j, j + 1 :]
    return codes, origin
