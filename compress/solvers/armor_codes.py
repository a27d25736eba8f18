"""The core of an ARMOR matrix in integers: swept for what it sees, then improved in turns with A and B."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.schemes import Armor, Operator
from .armor import CoreStep, Factors, round_of_chunks, step_a, total_loss
from .grid import Grid
from .refine import refine_chunk
from .row_metric import Metric
from .stored_factors import Stored, as_blocks, stored_blocks
from .sweep import best_sweep
from .system import damped_system

_ROWS = 4096
_DAMPING = 1e-4  # of the core's moment, which is that of a damped one


@dataclass
class QuantizedCore:
    """Codes (as floats) `[columns, rows]` on a grid, and A and B as they are to be stored; whether they are the nearest
    codes and the wrappers that were."""

    codes: Tensor
    grid: Grid
    a: Operator
    b: Operator
    simple: bool = False


def store_wrappers(
    factors: Factors, target: Tensor, moment: Tensor, core_step: CoreStep, store: Callable[[Tensor], Stored],
    chunk: int, b: Operator | None = None, row_weights: Tensor | None = None, outer: Tensor | None = None,
) -> tuple[Stored, Operator]:  # fmt: skip
    """Round B, solve for A, round A, and let the core make up for the rest; the factors follow.

    Args:
        store: what makes an operator of blocks.
        chunk: columns that the core step takes at a time.
        b: B as it is stored already, if it is not to be touched.
        row_weights: `[rows]` that errors are multiplied with, if they are not all alike.
        outer: R of each block of A, `[blocks, b, b]`, where factors and target are R times what is stored.

    Returns:
        A and B.
    """
    if b is None:
        b = store(factors.b)
    factors.b = as_blocks(b)
    error = target - factors.product()
    step_a(factors, error, moment)
    a = store(factors.a if outer is None else torch.linalg.solve(outer, factors.a))
    factors.a = as_blocks(a) if outer is None else outer @ as_blocks(a)
    error, weighted = target - factors.product(), factors
    if row_weights is not None:
        error *= row_weights
        weighted = Factors(factors.a * row_weights.view(*factors.a.shape[:2], 1), factors.core, factors.b)
    round_of_chunks(weighted, error, moment, core_step, move_b=False, chunk=chunk)
    return a, b


def quantize_core(armor: Armor, target: Tensor, moment: Tensor, grids: Sequence[Grid], rounds: int) -> QuantizedCore:
    """Integers for the values of a 2:4 core that keeps its pattern.

    Args:
        armor: whose core is 2:4 with plain values.
        target: W `[rows, columns]`.
        moment: H, damped.
        grids: candidates, of which each row keeps the best.
        rounds: turns of A, B and the core.
    """
    assert armor.core.keep is not None
    goal = target.T.contiguous()
    a, b = armor.blocks()
    factors = Factors(a.clone(), armor.core.dense().T.contiguous(), b.clone())
    keep = armor.core.keep.T.contiguous()
    system = damped_system(armor.seen(moment.float()), _DAMPING, act_order=True).to(moment.dtype)
    grid, codes, _ = best_sweep(factors.core, grids, system, _ROWS, keep)
    del system
    scales, zeros = grid.turned()
    factors.core = grid.values(codes.T).T.contiguous()
    span = grid.rounding.span(len(codes))
    chunk = math.lcm(span, b.shape[1])

    def step(part: slice, values: Tensor, gradient: Tensor, moment: Tensor, metric: Metric) -> None:
        refine_chunk(part, codes, values, gradient, (scales, zeros), grid, moment, keep, metric)

    error = goal - factors.product()
    for _ in range(rounds):
        step_a(factors, error, moment)
        round_of_chunks(factors, error, moment, step, move_b=armor.shared is None, chunk=chunk)
    dtype = grid.steps.dtype
    bits = armor.a.scheme().get("bits", 16)
    fixed = armor.b if armor.shared else None
    left, right = store_wrappers(factors, goal, moment, step, lambda x: stored_blocks(x, dtype, bits), chunk, fixed)
    grid = grid.moved(scales.T.contiguous(), grid.zeros)
    factors.core = grid.values(codes.T).T.contiguous()
    lost = total_loss(goal - factors.product(), moment)
    values = armor.core.dense()
    nearest = grids[0].codes(values).T.contiguous()
    simple = Factors(a, (grids[0].values(nearest.T) * keep.T).T.contiguous(), b)
    rounded = total_loss(goal - simple.product(), moment)
    if not lost <= rounded:  # also where it is not a number
        return QuantizedCore(nearest, grids[0], armor.a, armor.b, simple=True)
    return QuantizedCore(codes, grid, left, right)
