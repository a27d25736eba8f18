"""Rows that the end of the model couples: codes of a whole linear for the loss `tr(M Δ H Δᵀ)`.

M `[rows, rows]` says what errors of a linear's outputs cost together (`calibrate/curvature.py`). The sweep over columns
serves for it in blocks of rows: with `M⁻¹ = Uᵀ U`, rows in the order in which they are solved for, the later ones make
up best for the errors of the earlier where they aim at targets moved by `U_laterᵀ E`, `E = U_own⁻ᵀ (target − values)`:
the feedback that GPTQ has between columns (YAQA, arXiv:2505.22988, has it between single rows). Every n-th row makes a
block, for neighbours, rows of one head, are coupled most. Then scales and codes are improved in turn by the exact
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...calibrate.curvature import Curvature
from ...runtime import processes
from .beam import beam_codes
from .compiled import best_steps, couple_columns, refused_steps
from .grid import Grid
from .refine import differences, times
from .sparse24 import swept
from .sweep import LEAF
from .system import System, inverse_factor

_BLOCKS = 16  # of rows
_DAMPING = 0.1  # share of the mean diagonal that is added to what errors of outputs cost


def damped_metric(metric: Tensor, damping: float, tokens: int) -> Tensor:
    """A metric with a mean diagonal of one that can be inverted: moved to its diagonal by rows / (rows + tokens), and
    with a share of its mean added to that."""
    rows = len(metric)
    share = rows / (rows + tokens)
    own = metric.diagonal()
    damped = metric * (1 - share)
    damped.diagonal().add_(share * own + damping * own.mean())
    return damped / damped.diagonal().mean()


def metric_of(curvature: Curvature | None) -> Tensor | None:
    """The metric to solve with; None where nothing is known of what errors cost, or they cost nothing as far as the
    walk back could see."""
    if curvature is None or curvature.metric is None or not 0 < float(curvature.metric.trace()) < float("inf"):
        return None
    return damped_metric(curvature.metric, _DAMPING, curvature.tokens)


def coupled_share(curvature: Curvature) -> float:
    """What is left of a linear's loss where later rows make up for the errors of earlier ones, of as much as rows on
    their own have: with `M = L D Lᵀ`, `tr D / tr M` (as for columns in QuIP, arXiv:2307.13304)."""
    metric = metric_of(curvature)
    if metric is None:
        return 1.0
    mean = float(metric.diagonal().mean())
    return float(torch.linalg.cholesky(metric).diagonal().square().mean()) / mean


def coupled_losses(delta: Tensor, moment: Tensor, metric: Tensor) -> Tensor:
    """Each row's part of `tr(M Δ H Δᵀ)`: Δ columns first, `[columns, rows]` → `[rows]`."""
    return torch.linalg.vecdot(times(moment, delta), delta @ metric, dim=0)


def in_blocks(target: Tensor, metric: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Solve for blocks of rows one after the other, later ones making up for the errors of the earlier.

    Args:
        target: columns first, `[columns, rows]`.
        metric: M, positive definite.
        solve: what some rows aim at `[columns, n]`, and which they are `[n]` → what is left of the difference.
    """
    rows = target.shape[1]
    blocks = [torch.arange(start, rows, _BLOCKS, device=target.device) for start in range(min(_BLOCKS, rows))]
    order = torch.cat(blocks)
    factor = inverse_factor(metric, order)
    assert factor is not None
    work, start = target[:, order], 0
    for block in blocks:
        own, rest = slice(start, start + len(block)), slice(start + len(block), rows)
        missed = -solve(work[:, own].contiguous(), block)
        errors = torch.linalg.solve_triangular(factor[own, own], missed, upper=True, left=False)
        work[:, rest] -= errors @ factor[own, rest]
        start = own.stop


def _side_by_side(
    find: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], aims: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """What is found for rows `[columns, n]` of a block, which are independent of each other, by all processes."""
    count = min(processes.size(), len(rows))
    parts = zip(aims.tensor_split(count, 1), rows.tensor_split(count), strict=True)
    found = processes.spread([partial(find, *part) for part in parts], [1.0] * count)
    first, second = zip(*found, strict=True)
    return torch.cat(first, 1), torch.cat(second, 1)


def coupled_sweep(
    target: Tensor, grid: Grid, system: System, metric: Tensor, keep: Tensor | None = None, width: int = 1
) -> Tensor:
    """Codes of the column sweep on a grid, blocks of rows one after the other, with feedback between them.

    Args:
        target: columns first, `[columns, rows]`; keep: bool alike, false where a zero is to stay.
        metric: M, positive definite.
        width: choices of codes that a row follows side by side.

    Returns:
        `[columns, rows]`, as floats.
    """
    codes = torch.empty_like(target)

    def found(aims: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        own, kept = grid.rows(rows), None if keep is None else keep[:, rows]
        best = beam_codes(aims, own, system, width, kept)
        return best, differences(best, own, aims)

    def solve(aims: Tensor, rows: Tensor) -> Tensor:
        codes[:, rows], delta = _side_by_side(found, aims, rows)
        return delta

    in_blocks(target, metric, solve)
    return codes


def coupled_descent(
    codes: Tensor, delta: Tensor, grid: Grid, moment: Tensor, metric: Tensor, keep: Tensor | None = None
) -> Grid:
    """One round over the groups: scales with all else fixed, then every code in turn, which a processor does.

    Args:
        codes: `[columns, rows]`, as floats; overwritten.
        delta: `grid.values(codes) - target`, alike; overwritten.
        moment: H; metric: M, in the dtype of `delta`.
        keep: as of `coupled_sweep`.

    Returns:
        The grid with its new scales.
    """
    columns, span = len(codes), grid.rounding.span(len(codes))
    scales, zeros = grid.turned()
    at_hand = metric.cpu()
    for group, left in enumerate(range(0, columns, span)):
        part = slice(left, min(left + span, columns))
        zero = None if zeros is None else zeros[group]
        gradient = times(moment[part], delta) @ metric
        own = moment[part, part].to(delta.dtype)
        if grid.rounding.rows == 1 and grid.units is None:
            centred = codes[part] if zero is None else codes[part] - zero
            moved = _move_scales(centred, gradient, scales[group], own, metric, grid, group)
            delta[part] += moved
            gradient += (own @ moved) @ metric
        for start in range(left, part.stop, LEAF):
            few = slice(start, min(start + LEAF, part.stop))
            here, rest = slice(start - left, few.stop - left), slice(few.stop - left, None)
            before = delta[few].clone()
            _couple(
                codes[few], delta[few], gradient[here], own[here, here], at_hand, scales[group], few, keep, zero, grid
            )
            gradient[rest] += own[rest, here] @ ((delta[few] - before) @ metric)
    return grid.moved(scales.T.contiguous(), None if zeros is None else zeros.T.contiguous())


def _couple(
    codes: Tensor,
    delta: Tensor,
    gradient: Tensor,
    own: Tensor,
    metric: Tensor,
    scale: Tensor,
    columns: slice,
    keep: Tensor | None,
    zero: Tensor | None,
    grid: Grid,
) -> None:
    """`couple_columns` on tensors of any device."""
    kept, zeros = None if keep is None else keep[columns].cpu(), None if zero is None else zero.cpu()
    changed = codes.cpu(), delta.cpu(), gradient.cpu()
    state = *changed, own.cpu().contiguous(), metric, scale.cpu(), zeros, kept
    couple_columns(*state, grid.rounding.numbers, fractional=grid.units is not None)
    if codes.device.type != "cpu":
        for there, here in zip((codes, delta, gradient), changed, strict=True):
            there.copy_(here)


def _move_scales(
    centred: Tensor, gradient: Tensor, scale: Tensor, own: Tensor, metric: Tensor, grid: Grid, group: int
) -> Tensor:
    """Better scales `[rows]` of a group, in place, each row's only where it lowers the loss, those before it being as
    they are then.

    Returns:
        By how much values change, `[n, rows]`.
    """
    quadratic = ((centred.T @ (own @ centred)) * metric).cpu()
    slopes = torch.linalg.vecdot(centred, gradient, dim=0).cpu()
    change = grid.storable(scale + best_steps(quadratic, slopes).to(scale.device), group) - scale
    change = torch.where(change.abs() < 0.5 * scale.abs(), change, 0.0)
    change = refused_steps(quadratic, slopes, change.cpu()).to(scale.device)
    scale += change
    return centred * change


def coupled_pairs(target: Tensor, system: System, metric: Tensor, sweeps: int) -> Tensor:
    """2:4 weights as `sparse24.swept` finds them, in blocks of rows.

    Args:
        target: columns first, `[columns, rows]`.
        metric: M, positive definite.

    Returns:
        The sparse weight, alike.
    """
    values = torch.empty_like(target)

    def solve(aims: Tensor, rows: Tensor) -> Tensor:
        values[:, rows], delta = _side_by_side(lambda own, _: swept(own.contiguous(), system, sweeps), aims, rows)
        return delta

    in_blocks(target, metric, solve)
    return values


def coupled(
    codes: Tensor, target: Tensor, grid: Grid, system: System, metric: Tensor, keep: Tensor | None, rounds: int,
    width: int = 1,
) -> tuple[Tensor, Grid]:  # fmt: skip
    """Codes and grid of a lower `tr(M Δ H Δᵀ)` than some that were found row by row, or these.

    Args:
        codes: columns first, `[columns, rows]`, as floats; target, keep: alike.
        metric: M, damped.
        rounds: of descent.
        width: as of `coupled_sweep`.
    """
    moment = system.moment
    found = coupled_sweep(target, grid, system, metric, keep, width)
    delta, better = differences(found, grid, target), grid
    for _ in range(rounds):
        better = coupled_descent(found, delta, better, moment, metric, keep)
    before = coupled_losses(differences(codes, grid, target), moment, metric).sum()
    return (found, better) if coupled_losses(delta, moment, metric).sum() < before else (codes, grid)
