"""GPTQ, and what improves on it in the same stored form.

Per group of linears that read the same input (their rows stacked, since rows are independent):

1. the corrected target `V = W + α W [Σ (x − x̃) x̃ᵀ] H⁻¹`, for which `‖W X − Q X̃‖² = ‖(V − Q) X̃‖² + const` at α = 1
   (the objective of GPTAQ, arXiv:2504.02692, and Qronos, arXiv:2505.11695);
2. static full-range grids from V, columns in order of falling `H_ii` (act-order without a stored permutation);
3. the column sweep of GPTQ (arXiv:2210.17323), for a few ranges of the grid; each row keeps the best;
4. rounds of scale refit and coordinate descent on the codes, which never raise the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...calibrate.statistics import Statistics
from ...calibrate.walk import StageWork
from ...runtime.operators import Dense
from ..events import Event, Fallback, LayerDone
from ..solvers.grid import Grid, range_grid, round_to_grid
from ..solvers.refine import coordinate_descent, refit_scales, row_losses
from ..solvers.sweep import column_sweep
from ..solvers.system import NotSolvable, System, damped_system
from .base import Need
from .quantizer import Quantizer, bits_per_weight, quantized

_ROWS = 4096  # solved at a time: memory is bounded, and GEMMs are large enough
_SHRINKS = (1.0, 0.95, 0.9, 0.85)  # of a group's range: cutting off the extremes makes every step smaller


class Gptq(Quantizer):
    """Quantize column after column, letting the columns that remain make up for the error."""

    step: ClassVar[str] = "gptq"
    kind: Literal["gptq"]
    act_order: bool = Field(True, description="columns with large inputs first; costs nothing at run time")
    correction: float = Field(
        1.0, ge=0, le=1, description="how much of the error of earlier layers to make up for (α); 0: plain GPTQ"
    )
    refinements: int = Field(3, ge=0, le=20, description="rounds of scale refit and coordinate descent; 0: plain GPTQ")
    search: bool = Field(True, description="try narrower ranges too, and keep the best for each row; false: plain GPTQ")
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the second moment")

    sequential: bool = Field(
        True,
        description="statistics of the model as compressed so far; false: of the original model, which can be kept and "
        "used again (--statistics), but cannot be corrected for earlier errors",
    )

    @property
    def needs(self) -> frozenset[Need]:
        if not self.sequential:
            return frozenset({"reference"})
        return frozenset({"moment", "cross"} if self.correction else {"moment"})

    def flops(self, rows: int, columns: int) -> float:
        solve = 2.0 * columns**3 + (1 + 4 * (self.correction > 0) + 6 * self.refinements) * rows * columns**2
        return solve + 2000.0 * columns * rows

    def memory(self, shapes: Sequence[tuple[int, int]]) -> float:
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        # Factoring holds five float64 copies of the moment; solving, two float32 ones, the weights, grids and codes of
        # all rows and about ten float32 copies of the rows at hand.
        return max(41.0 * columns**2, 8.0 * columns**2 + 10.0 * rows * columns + 44.0 * min(rows, _ROWS) * columns)

    def apply(self, work: StageWork) -> Iterator[Event]:
        groups: dict[int, list[str]] = {}
        for name in work.linears:
            if self.wants(name):
                statistics = work.statistics.get(name)
                groups.setdefault(id(statistics if statistics is not None else name), []).append(name)
        for names in groups.values():
            yield from self._apply_group(work, names)

    def _apply_group(self, work: StageWork, names: list[str]) -> Iterator[Event]:
        operators = [work.linears[name] for name in names]
        weights = [operator.weight for operator in operators if isinstance(operator, Dense)]
        stacked = torch.cat([weight.float() for weight in weights])
        statistics = work.statistics.get(names[0])
        solution, reason = self._solve(stacked, statistics, weights[0].dtype)
        start = 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(start, start + weight.shape[0])
            start += weight.shape[0]
            zeros = None if solution.grid.zeros is None else solution.grid.zeros[rows]
            grid = Grid(solution.grid.scales[rows], zeros, self.bits, solution.grid.group_size, weight.dtype)
            result = quantized(solution.codes[rows], grid)
            work.linears[name] = result
            if reason:
                yield Fallback(name, self.step, reason)
            error = float(solution.losses[rows].sum() / solution.scale[rows].sum().clamp(min=1e-30))
            tokens = 0 if statistics is None else statistics.tokens
            yield LayerDone(name, self.step, error, bits_per_weight(result), tokens)

    def _solve(self, weight: Tensor, statistics: Statistics | None, stored: torch.dtype) -> tuple[Solution, str]:
        """The best solution, and why it is the simple one if it is."""
        simple = range_grid(weight, self.bits, self.group_for(weight.shape[1]), self.symmetric, stored)
        if statistics is None or statistics.tokens == 0:
            return Solution.without_data(simple, weight), "no calibration tokens"
        try:
            system = damped_system(statistics.moment, self.damping, act_order=self.act_order).to(torch.float32)
        except NotSolvable as error:
            return Solution.without_data(simple, weight), str(error)
        parts = [self._solve_rows(rows, statistics.cross, system, stored) for rows in weight.split(_ROWS)]
        solution, rounded = (Solution.joined(column) for column in zip(*parts, strict=True))
        if solution.losses.sum() <= rounded.losses.sum():
            return solution, ""
        return rounded, "rounding to nearest had the lower loss"

    def _solve_rows(
        self, weight: Tensor, cross: Tensor | None, system: System, stored: torch.dtype
    ) -> tuple[Solution, Solution]:
        """The full solution of some rows, and the nearest values to compare it with."""
        options = (self.bits, self.group_for(weight.shape[1]), self.symmetric, stored)
        target = weight
        if self.correction and cross is not None:
            target = corrected_target(weight, cross, system, self.correction)
        shrinks = _SHRINKS if self.search else _SHRINKS[:1]
        grid, codes, losses = best_sweep(target, [range_grid(target, *options, shrink) for shrink in shrinks], system)
        pull = target @ system.moment
        for _ in range(self.refinements):
            grid = refit_scales(codes, grid, system.moment, pull)
            codes = coordinate_descent(target, codes, grid, system.moment)
        if self.refinements:
            losses = row_losses(grid.values(codes) - target, system.moment)
        scale = torch.linalg.vecdot(pull, target)
        simple = range_grid(weight, *options)
        simple_codes = simple.codes(weight)
        simple_losses = row_losses(simple.values(simple_codes) - target, system.moment)
        return Solution(grid, codes, losses, scale), Solution(simple, simple_codes, simple_losses, scale)


@dataclass(frozen=True)
class Solution:
    """Codes `[rows, columns]` on a grid; per row, their loss and that of zeros in their place."""

    grid: Grid
    codes: Tensor
    losses: Tensor
    scale: Tensor

    @classmethod
    def without_data(cls, grid: Grid, weight: Tensor) -> Solution:
        """The nearest codes; losses are squared errors of the weight."""
        codes = grid.codes(weight)
        return cls(grid, codes, (grid.values(codes) - weight).square().sum(1), weight.square().sum(1))

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """One solution of all rows."""
        first = parts[0].grid
        zeros = None
        if first.zeros is not None:
            zeros = torch.cat([part.grid.zeros for part in parts if part.grid.zeros is not None])
        scales = torch.cat([part.grid.scales for part in parts])
        grid = Grid(scales, zeros, first.bits, first.group_size, first.stored)
        codes, losses, scale = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "losses", "scale")
        )
        return cls(grid, codes, losses, scale)


def corrected_target(weight: Tensor, cross: Tensor, system: System, alpha: float) -> Tensor:
    """`W + α W C H⁻¹` with C the cross moment `[columns, columns]`."""
    return weight + alpha * system.solve_right(weight @ cross.to(weight.dtype))


def best_sweep(target: Tensor, grids: Sequence[Grid], system: System) -> tuple[Grid, Tensor, Tensor]:
    """Sweep on each grid; every row keeps the scales, zeros and codes of its lowest loss, which is returned too."""
    best, (codes, losses) = grids[0], gptq_codes(target, grids[0], system)
    for grid in grids[1:]:
        other_codes, other_losses = gptq_codes(target, grid, system)
        better = (other_losses < losses)[:, None]
        losses = torch.minimum(losses, other_losses)
        codes = torch.where(better, other_codes, codes)
        zeros = None
        if best.zeros is not None and grid.zeros is not None:
            zeros = torch.where(better, grid.zeros, best.zeros)
        best = Grid(torch.where(better, grid.scales, best.scales), zeros, grid.bits, grid.group_size, grid.stored)
    return best, codes, losses


def gptq_codes(target: Tensor, grid: Grid, system: System, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """Codes (as floats, `[rows, columns]`) of the column sweep on a static grid, in the system's order; row losses."""
    columns = target.shape[1]
    scales, zeros = grid.columns(columns)
    scales, zeros = scales.T.contiguous(), None if zeros is None else zeros.T.contiguous()
    codes = torch.empty(columns, target.shape[0], dtype=target.dtype, device=target.device)
    places = system.order.tolist()

    def fix(j: int, column: Tensor) -> Tensor:
        place = places[j]
        zero = None if zeros is None else zeros[place]
        code = round_to_grid(column, scales[place], zero, grid.low, grid.high)
        codes[place] = code
        return (code if zero is None else code - zero) * scales[place]

    _, losses = column_sweep(target[:, system.order], system.factor, fix, block_size)
    return codes.T.contiguous(), losses
