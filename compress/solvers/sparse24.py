"""2:4 patterns: which two of four neighbours to keep, and with what values.

Matrices are columns first, `[columns, rows]`: the four neighbours of a group are four consecutive rows of the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .row_metric import Metric, settle, times_blocks
from .sweep import LEAF, by_column, column_sweep, halves
from .system import System

CHUNK = 128  # columns whose gradient is computed in one GEMM
_PAIRS = torch.combinations(torch.arange(4), 2)  # the six ways to keep two of four


def top_pairs(scores: Tensor) -> Tensor:
    """bool like scores `[columns, rows]`: the two largest of every four."""
    groups = scores.view(-1, 4, scores.shape[1])
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(1, groups.topk(2, dim=1).indices, True).view(scores.shape)


def nowag_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What NoWag divides a weight `[columns, rows]` by: norms of the columns, then of the rows of what remains.

    Returns:
        `[columns, 1]` and `[rows]`.
    """
    inputs = weight.norm(dim=1, keepdim=True) + 1e-5
    return inputs, (weight / inputs).norm(dim=0) + 1e-5


def sparsegpt(target: Tensor, system: System) -> Tensor:
    """SparseGPT (arXiv:2301.00774): the column sweep; every fourth column picks the two of the next four to keep.

    Args:
        target: `[columns, rows]`.
        system: whose order keeps groups of four together.

    Returns:
        The sparse weight, alike.
    """
    work = target[system.order]
    result = torch.empty_like(work)
    spread = system.factor.diagonal().to(work.dtype)[:, None]
    keep = torch.empty(4, work.shape[1], dtype=torch.bool, device=work.device)

    def fix(j: int, column: Tensor) -> Tensor:
        if j % 4 == 0:  # the sweep has corrected these four for all before them
            keep.copy_(top_pairs((work[j : j + 4] / spread[j : j + 4]).square_()))
        result[system.order[j]] = column * keep[j % 4]
        return result[system.order[j]]

    column_sweep(work, system.factor, by_column(fix))
    return result


def swept(target: Tensor, system: System, sweeps: int) -> tuple[Tensor, Tensor]:
    """SparseGPT's weight, then rounds over its groups (`sparsegpt`, `sweep_pairs`).

    Returns:
        The sparse weight `[columns, rows]`, and what it misses the target by.
    """
    values = sparsegpt(target, system)
    delta = values - target
    for _ in range(sweeps):
        sweep_pairs(values, delta, system.moment)
    return values, delta


def sweep_pairs(values: Tensor, delta: Tensor, moment: Tensor) -> None:
    """One round over the groups: the best pair of each and its best values, all others staying as they are.

    Exact coordinate descent on `tr(δᵀ H δ)` over groups of four: no row's loss rises.

    Args:
        values: sparse `[columns, rows]`; overwritten.
        delta: `values - target`, alike; overwritten.
        moment: H `[columns, columns]`; in bfloat16, gradients are computed in bfloat16.
    """
    coarse = delta.to(moment.dtype)
    for start in range(0, len(values), CHUNK):
        part = slice(start, start + CHUNK)
        before = values[part].clone()
        gradient = (moment[part] @ coarse).to(delta.dtype)
        descend_pairs(values[part], gradient, moment[part, part].to(delta.dtype))
        delta[part] += values[part] - before
        coarse[part] = delta[part]


def descend_pairs(values: Tensor, gradient: Tensor, moment: Tensor, metric: Metric | None = None) -> None:
    """The same within some columns, whose gradient `H δ M` is given; both are overwritten.

    For a group with the moment Q and a row that matters by m, `q = m Q s - g` is what the values s should explain; of
    each pair p, `v = Q_pp⁻¹ q_p / m` are the best values and `q_pᵀ Q_pp⁻¹ q_p` is what they gain (ARMOR's closed form,
    arXiv 2510.05528).
    """
    tables = pair_tables(torch.stack([moment[k : k + 4, k : k + 4] for k in range(0, len(moment), 4)]))
    _descend(values, gradient, moment, metric, tables)


def pair_tables(quads: Tensor) -> tuple[Tensor, Tensor]:
    """For moments `[groups, 4, 4]`, what maps q to the gain of each pair and to its values.

    Returns:
        `[groups, 6, 16]`, to be multiplied with the products of q's entries, and `[groups, 24, 4]` with q itself.
    """
    first, second = _PAIRS[:, 0], _PAIRS[:, 1]
    # An input without energy next to others would make the inverse infinite.
    floor = 1e-6 * quads.diagonal(dim1=1, dim2=2).amax(1)[:, None]
    a, d = quads[:, first, first].maximum(floor), quads[:, second, second].maximum(floor)
    off = quads[:, first, second]
    tiny = torch.finfo(quads.dtype).tiny
    det = (a * d - off * off).maximum(1e-6 * a * d).clamp(min=tiny)  # relative damping of nearly equal inputs
    inverse = quads.new_zeros(len(quads), 6, 4, 4)
    pair = torch.arange(6)
    inverse[:, pair, first, first], inverse[:, pair, second, second] = d / det, a / det
    inverse[:, pair, first, second] = inverse[:, pair, second, first] = -off / det
    return inverse.view(-1, 6, 16), inverse.view(-1, 24, 4)


def _descend(
    values: Tensor, gradient: Tensor, moment: Tensor, metric: Metric | None, tables: tuple[Tensor, Tensor]
) -> None:
    columns = len(values)
    if columns > LEAF:
        cut = halves(0, columns)
        left, right = slice(cut), slice(cut, columns)
        before = values[left].clone()
        first, second = ((tables[0][: cut // 4], tables[1][: cut // 4]), (tables[0][cut // 4 :], tables[1][cut // 4 :]))
        _descend(values[left], gradient[left], moment[left, left], metric, first)
        moved = values[left] - before
        if metric is not None:
            moved = times_blocks(moved, metric.blocks)
        gradient[right].addmm_(moment[right, left], moved)
        _descend(values[right], gradient[right], moment[right, right], metric, second)
        return
    for k in range(0, columns, 4):
        group = slice(k, k + 4)
        quad = moment[group, group]
        change = best_pairs(values[group], gradient[group], quad, metric, (tables[0][k // 4], tables[1][k // 4]))
        change.sub_(values[group])
        spread = settle(change, gradient[group], quad, metric)
        values[group] += change
        gradient[k:].addmm_(moment[k:, group], spread)


def best_pairs(
    values: Tensor, gradient: Tensor, quad: Tensor, metric: Metric | None, tables: tuple[Tensor, Tensor]
) -> Tensor:
    """The best sparse values `[4, rows]` of a group."""
    gains, inverses = tables
    weight = 1.0 if metric is None else metric.diagonal
    wanted = (quad @ values) * weight - gradient
    products = (wanted[:, None] * wanted).view(16, -1)
    best = (gains @ products).max(0).indices  # in a tenth of argmax's time
    found = (inverses @ wanted).view(6, 4, -1)
    return found.gather(0, best.expand(1, 4, -1))[0] / weight


def best_pairs_each(wanted: Tensor, quads: Tensor) -> Tensor:
    """Best sparse values of groups with a moment each: `[groups, 4]`, `[groups, 4, 4]` → `[groups, 4]`."""
    gains, inverses = pair_tables(quads)
    products = (wanted[:, :, None] * wanted[:, None]).view(-1, 16, 1)
    best = (gains @ products)[..., 0].argmax(1)
    found = (inverses @ wanted[..., None]).view(-1, 6, 4)
    return found[torch.arange(len(best), device=best.device), best]
