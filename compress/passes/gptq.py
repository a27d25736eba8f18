"""GPTQ, and what improves on it in the same stored form.

Per group of linears that read the same input (their rows stacked, since rows are independent):

1. the corrected target `V = W + α W [Σ (x − x̃) x̃ᵀ] H⁻¹`, for which `‖W X − Q X̃‖² = ‖(V − Q) X̃‖² + const` at α = 1
   (the objective of GPTAQ, arXiv:2504.02692, and Qronos, arXiv:2505.11695);
2. static full-range grids from V, columns in order of falling `H_ii` (act-order without a stored permutation);
3. the column sweep of GPTQ (arXiv:2210.17323), for a few ranges of the grid; each row keeps the best;
4. rounds of scale refit and coordinate descent on the codes, which never raise the loss;
5. rows that rounding to nearest serves better take that.
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
from ...kernels.dispatch import cpu_capability, products_dtype
from ...runtime.operators import Dense
from ..events import Event, Fallback, LayerDone
from ..solvers.grid import Grid, group_span, range_grid, round_to_grid
from ..solvers.refine import differences, refine, row_losses
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
        sweeps = len(_SHRINKS) if self.search else 1
        products = (1 + 2 * (self.correction > 0) + sweeps + 2 * self.refinements) * rows * columns**2
        # Column after column, a weight costs as much time as this many operations of a GEMM.
        return 2.0 * columns**3 + products + (3000.0 * sweeps + 6000.0 * self.refinements) * rows * columns

    def memory(self, shapes: Sequence[tuple[int, int]]) -> float:
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        # Factoring holds two float64 copies of the moment and two float32 ones; solving, four in bfloat16 at most, the
        # weights, codes and grids of all rows, and about six float32 copies of the rows at hand.
        return max(24.0 * columns**2, 8.0 * columns**2 + 4.0 * rows * columns + 24.0 * min(rows, _ROWS) * columns)

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
        statistics = work.statistics.get(names[0])
        solution, reason = self._solve(torch.cat(weights), statistics)
        start = 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(start, start + weight.shape[0])
            start += weight.shape[0]
            result = quantized(solution.codes[rows], solution.grid.rows(rows))
            work.linears[name] = result
            if reason:
                yield Fallback(name, self.step, reason)
            error = float(solution.losses[rows].sum() / solution.scale[rows].sum().clamp(min=1e-30))
            tokens = 0 if statistics is None else statistics.tokens
            yield LayerDone(name, self.step, error, bits_per_weight(result), tokens)

    def _solve(self, weight: Tensor, statistics: Statistics | None) -> tuple[Solution, str]:
        """The best solution for a stored weight `[rows, columns]`, and why it is the simple one where it is."""
        if statistics is None or statistics.tokens == 0:
            return self._rounded(weight), "rounded to nearest, for no calibration token came by (more data.samples?)"
        try:
            system = damped_system(statistics.moment, self.damping, act_order=self.act_order)
        except NotSolvable as error:
            return self._rounded(weight), f"rounded to nearest, for {error}"
        system = system.to(products_dtype(cpu_capability()))
        shift = None
        if self.correction and statistics.cross is not None:
            shift = Shift.of(statistics.cross, system, weight.shape[0])
        solution = Solution.joined([self._solve_rows(part, shift, system) for part in weight.split(_ROWS)])
        return solution, "rounded to nearest, which had the lower loss" if solution.simple.all() else ""

    def _grid(self, weight: Tensor, stored: torch.dtype, shrink: float = 1.0) -> Grid:
        return range_grid(weight, self.bits, self.group_for(weight.shape[1]), self.symmetric, stored, shrink)

    def _rounded(self, weight: Tensor) -> Solution:
        """The nearest codes; losses are squared errors of the weight."""
        exact = weight.float()
        grid = self._grid(exact, weight.dtype)
        codes = grid.codes(exact)
        losses = (grid.values(codes) - exact).square().sum(1)
        everything = torch.ones_like(losses, dtype=torch.bool)
        return Solution(grid, codes.to(torch.int8), losses, exact.square().sum(1), everything)

    def _solve_rows(self, weight: Tensor, shift: Shift | None, system: System) -> Solution:
        exact = weight.float()
        target = exact if shift is None else shift.corrected(exact, self.correction)
        grids = [self._grid(target, weight.dtype, shrink) for shrink in (_SHRINKS if self.search else _SHRINKS[:1])]
        simple = self._grid(exact, weight.dtype)
        target, rounded = target.T.contiguous(), simple.codes(exact).T.contiguous()
        del exact
        scale = row_losses(target, system.moment)
        simple_losses = row_losses(differences(rounded, simple, target), system.moment)
        rounded = rounded.to(torch.int8)
        grid, codes, losses = best_sweep(target, grids, system)
        if self.refinements:
            delta = differences(codes, grid, target)
            del target
            for _ in range(self.refinements):
                grid = refine(codes, delta, grid, system.moment)
            losses = row_losses(delta, system.moment)
        worse = simple_losses < losses
        codes = torch.where(worse, rounded, codes.to(torch.int8)).T.contiguous()
        return Solution(grid.where(~worse, simple), codes, torch.minimum(losses, simple_losses), scale, worse)


@dataclass(frozen=True)
class Solution:
    """int8 codes `[rows, columns]` on a grid; per row, their loss, that of zeros in their place, and whether they are
    the nearest ones for want of better."""

    grid: Grid
    codes: Tensor
    losses: Tensor
    scale: Tensor
    simple: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """One solution of all rows."""
        columns = zip(*((part.codes, part.losses, part.scale, part.simple) for part in parts), strict=True)
        return cls(Grid.stacked([part.grid for part in parts]), *map(torch.cat, columns))


@dataclass(frozen=True)
class Shift:
    """What corrects a target for the errors before it: `W → W + α W C H⁻¹`, C the cross moment `[columns, columns]`.

    Attributes:
        matrix: `C H⁻¹`, or C where the rows are few and it is cheaper to multiply them first.
        system: of H in the latter case.
    """

    matrix: Tensor
    system: System | None

    @classmethod
    def of(cls, cross: Tensor, system: System, rows: int) -> Shift:
        if rows < cross.shape[0]:
            return cls(cross.to(system.factor.dtype), system)
        return cls(system.solve_right(cross), None)

    def corrected(self, weight: Tensor, alpha: float) -> Tensor:
        """The target of `[rows, columns]`."""
        moved = weight.to(self.matrix.dtype) @ self.matrix
        if self.system is not None:
            moved = self.system.solve_right(moved)
        return torch.add(weight, moved, alpha=alpha)


def best_sweep(target: Tensor, grids: Sequence[Grid], system: System) -> tuple[Grid, Tensor, Tensor]:
    """Sweep on each grid; every row keeps the scales, zeros and codes of its lowest loss.

    Args:
        target: columns first, `[columns, rows]`.

    Returns:
        Grid, codes `[columns, rows]` (as floats) and losses `[rows]`.
    """
    found = []
    at_once = max(1, _ROWS // len(grids))  # the grids' rows are swept side by side
    for start in range(0, target.shape[1], at_once):
        rows = slice(start, min(start + at_once, target.shape[1]))
        stacked = Grid.stacked([grid.rows(rows) for grid in grids])
        codes, losses = gptq_codes(target[:, rows], stacked, system)
        count = rows.stop - rows.start
        best = losses.view(len(grids), count).argmin(0) * count + torch.arange(count, device=losses.device)
        found.append((stacked.rows(best), codes[:, best], losses[best]))
    chosen, swept, lowest = zip(*found, strict=True)
    return Grid.stacked(chosen), torch.cat(swept, 1), torch.cat(lowest)


def gptq_codes(target: Tensor, grid: Grid, system: System) -> tuple[Tensor, Tensor]:
    """Codes (as floats) of the column sweep on a static grid, in the system's order, and row losses.

    Args:
        target: columns first, `[columns, rows]`.
        grid: of these rows, or of several times as many: each of the stacked grids is swept.

    Returns:
        `[columns, rows of the grid]` and `[rows of the grid]`.
    """
    columns, rows = target.shape
    span = group_span(grid.group_size, columns)
    scales = grid.scales.T.contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    work = target[system.order].repeat(1, grid.scales.shape[0] // rows)
    codes = torch.empty_like(work)
    places = system.order.tolist()

    def fix(j: int, column: Tensor) -> Tensor:
        place = places[j]
        scale, zero = scales[place // span], None if zeros is None else zeros[place // span]
        code = round_to_grid(column, scale, zero, grid.low, grid.high)
        codes[place] = code
        return (code if zero is None else code - zero) * scale

    losses = column_sweep(work, system.factor, fix)
    return codes, losses
