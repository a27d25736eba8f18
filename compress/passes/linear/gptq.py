"""GPTQ, and what improves on it in the same stored form.

Per group of linears that read the same input (their rows stacked, since rows are independent):

1. the corrected target `V = W + α W [Σ (x − x̃) x̃ᵀ] H⁻¹`, for which `‖W X − Q X̃‖² = ‖(V − Q) X̃‖² + const` at α = 1
   (the objective of GPTAQ, arXiv:2504.02692, and Qronos, arXiv:2505.11695);
2. static full-range grids from V, columns in an order in which those behind a column tell least of it (sorted QR, in
   the place of act-order's falling `H_ii`; no permutation is stored);
3. the column sweep of GPTQ (arXiv:2210.17323), for a few ranges of the grid; each row keeps the best;
4. rounds of scale refit and coordinate descent on the codes, which never raise the loss;
5. rows that rounding to nearest serves better take that;
6. a second sweep on the scales that came of this, with several choices of codes side by side (`solvers/beam.py`), and 4
   again; each row keeps the better of the two.

`objective: model` goes on from there: `tr(M Δ H Δᵀ)`, M what errors of the outputs cost the answers of the model
(`calibrate/curvature.py`, as is what tokens count for in H), couples the rows. The second sweep is in 16 blocks of
rows, later ones making up for the errors of earlier ones, and scales and codes are improved by the exact gradient
(`solvers/coupled.py`); what was there stays where that is no better.

A 2:4 pattern stays as it is: what is not stored is a zero that the sweep cannot move. The core of an ARMOR matrix is
swept for the inputs `B x`, and then improved in turns with A and B (`solvers/armor.py`); what has a low-rank residual
aims at what that leaves. Columns that stay floats (`outlier_columns`) come last: all others are solved for with what is
left of the moment once these have made up for what they can (`Group.without`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...events import Event, Fallback, LayerDone
from ..base import Need
from .calibrated import ROWS, Calibrated, parts_of
from .quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from ....calibrate.curvature import Curvature
    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....kernels.numbers import Rounding
    from ....runtime.schemes import Operator
    from ...solvers.grid import Grid, Steps
    from ...solvers.system import System
    from .groups import Group

_COUPLED_ROUNDS = 2
_COUPLED = 3.0  # times as long as others, rows that a metric couples take
_SHRINKS = (1.0, 0.95, 0.9, 0.85)  # of a group's range: cutting off the extremes makes every step smaller


class Gptq(Quantizer, Calibrated):
    """Quantize column after column, letting the columns that remain make up for the error."""

    kind: Literal["gptq"]
    act_order: bool = Field(
        True,
        description="quantize columns in the order that lets later ones make up best for the errors of earlier ones, "
        "large inputs first; costs nothing at run time",
    )
    refinements: int = Field(3, ge=0, le=20, description="rounds of scale refit and coordinate descent; as GPTQ: 0")
    objective: Literal["layer", "model"] = Field(
        "layer",
        description="what errors are weighed by. layer: a linear's own outputs; model: what errors of these outputs do "
        "to the answers of the model, found by a walk back from its end, which couples the rows of a linear (of up to "
        "twice as many as a hidden state has numbers; others, experts' gate and up, and factors go by layer)",
    )
    beam: int = Field(
        8,
        ge=1,
        le=64,
        description="choices of codes that each row follows side by side in the last sweep, of which the best stays; "
        "1: a sweep as GPTQ has it, whose every code is final, and no other",
    )
    search: bool = Field(True, description="try narrower ranges too, and keep the best for each row; as GPTQ: false")

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | ({"curvature"} if self.objective == "model" else set())

    @property
    def _coupled(self) -> Callable[[Curvature], float] | None:
        from ...solvers.coupled import coupled_share

        return coupled_share if self.objective == "model" else None

    @property
    def _counted(self) -> bool:
        return self.sequential

    def flops(self, rows: int, columns: int) -> float:
        sweeps = len(_SHRINKS) if self.search else 1
        rounds = self.refinements * (1 + (self.beam > 1))
        products = (1 + sweeps + 2 * rounds) * rows * columns**2 + self.correcting(rows, columns)
        products += 4.0 * rows * columns**2  # the error that is told
        # Column after column, a weight costs as much time as this many operations of a GEMM.
        steps = 600.0 * sweeps + 1500.0 * self.beam * (self.beam > 1) + 1200.0 * rounds
        alone = 4.0 * columns**3 + products + steps * rows * columns
        if self.objective == "layer":
            return alone
        turns = 1 + 2 * _COUPLED_ROUNDS
        return alone + 2.0 * rows**3 + turns * 2.0 * rows * columns * (rows + columns) + 3000.0 * turns * rows * columns

    def memory(self, operators: Sequence[Operator]) -> float:
        from ...solvers.beam import carried

        shapes = [operator.shape for operator in operators]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        # Solving holds four copies of the moment in bfloat16 at most, the weights, codes and grids of all rows, and
        # about six float32 copies of the rows at hand, eight with several choices of codes.
        at_hand = 24.0 * min(rows, ROWS) * columns
        if self.beam > 1:
            at_hand += 8.0 * min(rows, ROWS) * columns + rows * columns + carried(rows, self.beam)
        alone = max(self.factoring(columns), 8.0 * columns**2 + 4.0 * rows * columns + at_hand)
        if any(_wrapped(operator) or operator.kind == "columns" for operator in operators):
            alone = 36.0 * columns**2 + 12.0 * rows * columns
        if self.objective == "layer":
            return alone
        largest = max(shape[0] for shape in shapes)  # its metric in four copies, one of float64 while it is factored
        return max(alone, 8.0 * columns**2 + 5.0 * rows * columns + 28.0 * largest**2 + 24.0 * largest * columns)

    def apply(self, work: StageWork) -> Iterator[Event]:
        import torch

        from .groups import groups_of

        # Codes stay on their grid whatever a rounded moment says of directions without energy; wrappers follow it.
        wrapped = any(_wrapped(operator) for operator in work.linears.values())
        exact = wrapped or any(_apart(operator) for operator in work.linears.values())
        products = torch.float32 if exact else None
        for group in groups_of(self, work, act_order=self.act_order, products=products, pruned=wrapped):
            targets = group.targets()
            aims = [_aim(operator, target) for operator, target in zip(group.operators, targets, strict=True)]
            alone = [number for number, (base, _) in enumerate(aims) if base.moves_inputs and group.system]
            stacked = [number for number in range(len(aims)) if number not in alone]
            for which in self._stacks(group, stacked, aims):
                yield from self._apply_stacked(work, group, which, aims, targets)
            for number in alone:
                yield from self._apply_armor(work, group, number, *aims[number], targets[number])

    def _stacks(self, group: Group, numbers: list[int], aims: list[tuple[Operator, Tensor]]) -> list[list[int]]:
        """Which linears are solved for together: those that are rounded alike, 2:4 or not, with the same columns apart;
        each on its own where rows of one share their scales."""
        found: dict[Any, list[int]] = {}
        for number in numbers:
            base, target = aims[number]
            rounding = self.rounding(target.shape[1], group.names[number])
            own = number if rounding.rows > 1 else -1
            alike = own, rounding, _leaf(base).keep is not None, _apart(group.operators[number])
            found.setdefault(alike, []).append(number)
        return list(found.values())

    def _errors(self, weight: Tensor, roundings: Sequence[Rounding], statistics: Statistics) -> Iterator[Tensor]:
        from ...solvers.refine import differences
        from ...solvers.sweep import gptq_codes
        from ...solvers.system import NotSolvable, damped_system

        share = self.shrinkage_for(weight.shape[1], statistics.tokens)
        try:
            system = damped_system(statistics.moment, self.damping, act_order=self.act_order, shrinkage=share)
        except NotSolvable:
            yield from super()._errors(weight, roundings, statistics)
            return
        exact = weight.float()
        target = exact.T.contiguous()
        for rounding in roundings:
            grid = _grid(exact, rounding, self.steps([weight], rounding, weight.dtype), None)
            yield differences(gptq_codes(target, grid, system)[0], grid, target)

    def _finish(
        self, work: StageWork, group: Group, number: int, result: Operator, target: Tensor, reason: str
    ) -> Iterator[Event]:
        name = group.names[number]
        work.linears[name] = result
        if reason:
            yield Fallback(name, self.kind, reason)
        yield LayerDone.of(name, self.kind, group.error(target, result), result, group.tokens)

    def _apply_stacked(
        self,
        work: StageWork,
        group: Group,
        which: list[int],
        aims: list[tuple[Operator, Tensor]],
        targets: list[Tensor],
    ) -> Iterator[Event]:
        """Linears that can be solved for together (`_stacks`), their rows stacked."""
        import torch

        from ....runtime.schemes import Problem, WithColumns
        from .groups import seen

        leaves = [_leaf(aims[number][0]) for number in which]
        weight = torch.cat([leaf.dense(group.originals[0].dtype) for leaf in leaves])
        kept = [leaf.keep for leaf in leaves if leaf.keep is not None]
        target = torch.cat([aims[number][1] for number in which])
        rounding = self.rounding(weight.shape[1], group.names[which[0]])
        rest = group.without(_apart(group.operators[which[0]]), self.act_order)
        keep = torch.cat(kept) if kept else None
        solution, reason = self._solve(weight, target, keep, rounding, rest)
        known = work.curvatures if self.objective == "model" else {}  # another pass may have asked
        metrics = [known.get(group.names[number]) for number in which]
        sizes = [leaf.shape[0] for leaf in leaves]
        solution = self._swept_again(solution, target, keep, list(zip(sizes, metrics, strict=True)), rest)
        reason = reason if solution.simple.all() else ""
        start = 0
        for number, leaf in zip(which, leaves, strict=True):
            rows = slice(start, start + leaf.shape[0])
            start = rows.stop
            operator, met = group.operators[number], work.statistics.get(group.names[number])
            result = self.quantized(solution.codes[rows], solution.grid.rows(rows), leaf, seen(met, operator))
            whole = _replaced(operator, leaf, result)
            if isinstance(whole, WithColumns) and group.system is not None:
                whole = whole.refitted(Problem(targets[number], group.system.moment))
            yield from self._finish(work, group, number, whole, targets[number], reason)

    def _apply_armor(
        self, work: StageWork, group: Group, number: int, base: Operator, aim: Tensor, target: Tensor
    ) -> Iterator[Event]:
        from ....runtime.schemes import Armor
        from ...solvers.armor_codes import quantize_core

        system = group.system
        assert isinstance(base, Armor)
        assert system is not None
        core = base.core.dense()
        rounding = self.rounding(core.shape[1], group.names[number])
        steps = self.steps(group.originals, rounding, group.originals[0].dtype)
        shrinks = self._shrinks(rounding, steps)
        grids = [_grid(core, rounding, steps, group.energy, [shrink]) for shrink in shrinks]
        result = quantize_core(base, aim, system.moment, grids, self.refinements)
        codes, grid = result.codes, result.grid
        coded = self.quantized(grid.rounding.numbers.as_bytes(codes.T.contiguous()), grid, base.core)
        whole = _replaced(group.operators[number], base, replace(base, a=result.a, core=coded, b=result.b))
        reason = "rounded to nearest, which had the lower loss" if result.simple else ""
        yield from self._finish(work, group, number, whole, target, reason)

    def _shrinks(self, rounding: Rounding, steps: Steps) -> Sequence[float]:
        from ....kernels.numbers import E4M3

        # Of powers of two, a group takes the better of the two that there are; steps of float8 are a share of each
        # number, not of the range.
        return _SHRINKS if self.search and not steps.coarse and rounding.numbers != E4M3 else _SHRINKS[:1]

    def _solve(
        self, weight: Tensor, target: Tensor, keep: Tensor | None, rounding: Rounding, group: Group
    ) -> tuple[Solution, str]:
        """The best solution for rows of a group, and why it is the simple one where it is.

        Args:
            weight: what is to be quantized, in the dtype of the model, `[rows, columns]`.
            target: what it aims at, float32.
            keep: bool alike, false where zeros are to stay; None for nowhere.
        """
        from ....runtime.processes import spread

        steps = self.steps(group.originals, rounding, weight.dtype)
        if group.system is None:
            shrinks = self._shrinks(rounding, steps)
            rounded = [_rounded(rows, rounding, steps, group.energy, shrinks) for rows in weight.split(ROWS)]
            return Solution.joined(rounded), f"rounded to nearest, for {group.reason}"

        def solved(rows: slice) -> Solution:
            kept = None if keep is None else keep[rows]
            return self._solve_rows(weight[rows], target[rows], kept, rounding, steps, group)

        parts = parts_of(len(weight), rounding.rows)
        solution = Solution.joined(spread([partial(solved, part) for part in parts], [_length(part) for part in parts]))
        return solution, "rounded to nearest, which had the lower loss" if solution.simple.all() else ""

    def _swept_again(
        self,
        solution: Solution,
        target: Tensor,
        keep: Tensor | None,
        linears: Sequence[tuple[int, Curvature | None]],
        group: Group,
    ) -> Solution:
        """A solution whose rows errors at the end of the model couple, for linears of which it is known what they cost;
        for others, the better of it and that of a second sweep.

        Args:
            target, keep: as of `_solve`.
            linears: rows and curvature of each.
        """
        from ....runtime.processes import spread
        from ...solvers.coupled import metric_of

        if group.system is None:
            return solution
        system = group.system

        def again(rows: slice, metric: Tensor | None) -> Solution:
            kept = None if keep is None else keep[rows]
            return self._again(solution.part(rows), target[rows], kept, metric, system)

        parts, start = list[tuple[slice, "Tensor | None"]](), 0
        for size, curvature in linears:
            metric, stop = metric_of(curvature), start + size
            coupled = [(slice(start, stop), metric)]  # others need not be solved for at once
            parts += coupled if metric is not None else [(part, None) for part in parts_of(size, 1, start)]
            start = stop
        costs = [(1.0 if metric is None else _COUPLED) * _length(rows) for rows, metric in parts]
        return Solution.joined(spread([partial(again, *part) for part in parts], costs, divisible=True))

    def _again(
        self, found: Solution, target: Tensor, keep: Tensor | None, metric: Tensor | None, system: System
    ) -> Solution:
        """What a second sweep makes of a solution, all as of `_solve`; of rows that a metric couples, together."""
        from ...solvers.beam import improved
        from ...solvers.coupled import coupled

        if metric is None and self.beam == 1:
            return found
        numbers, aim = found.grid.rounding.numbers, target.T.contiguous()
        state = numbers.of_bytes(found.codes).T.contiguous(), aim, found.grid, system
        kept = None if keep is None else keep.T.contiguous()
        if metric is None:
            codes, grid = improved(*state, kept, self.beam, self.refinements)
        else:
            codes, grid = coupled(*state, metric, kept, _COUPLED_ROUNDS, self.beam)
        changed = numbers.as_bytes(codes).T.contiguous()
        return Solution(grid, changed, found.simple & (changed == found.codes).all(1))

    def _solve_rows(
        self, weight: Tensor, target: Tensor, keep: Tensor | None, rounding: Rounding, steps: Steps, group: Group
    ) -> Solution:
        import torch

        from ...solvers.refine import differences, refine, row_losses
        from ...solvers.sweep import best_sweep

        exact, system = weight.float(), group.system
        assert system is not None
        # What is sparse was solved for already, values and pattern together: the sweep starts from that.
        start = target if keep is None else exact
        shrinks = self._shrinks(rounding, steps)
        grids = [_grid(start, rounding, steps, group.energy, [shrink]) for shrink in shrinks]
        # Rows that share their scales have the same ones either way.
        simple = grids[0] if rounding.rows > 1 else _grid(exact, rounding, steps, group.energy)
        rounded = simple.codes(exact).T.contiguous()
        same, start, target = start is target, start.T.contiguous(), target.T.contiguous()
        kept = None if keep is None else keep.T.contiguous()
        del exact
        simple_losses = row_losses(differences(rounded, simple, target), system.moment)
        rounded = rounding.numbers.as_bytes(rounded)
        grid, codes, losses = best_sweep(start, grids, system, ROWS, kept)
        del start
        if self.refinements or not same:
            delta = differences(codes, grid, target)
            del target
            for _ in range(self.refinements):
                grid = refine(codes, delta, grid, system.moment, kept)
            losses = row_losses(delta, system.moment)
        worse = simple_losses < losses
        codes = torch.where(worse, rounded, rounding.numbers.as_bytes(codes)).T.contiguous()
        return Solution(grid.where(~worse, simple), codes, worse)


def _grid(
    weight: Tensor, rounding: Rounding, steps: Steps, energy: Tensor | None, shrinks: Sequence[float] = (1.0,)
) -> Grid:
    from ...solvers.grid import RANGES, searched_grid

    shares = [shrink * share for shrink in shrinks for share in RANGES[rounding.scales]]
    return searched_grid(weight, energy, rounding, steps, shares)


def _rounded(weight: Tensor, rounding: Rounding, steps: Steps, energy: Tensor, shrinks: Sequence[float]) -> Solution:
    """The nearest codes."""
    import torch

    exact = weight.float()
    grid = _grid(exact, rounding, steps, energy, shrinks)
    codes = grid.codes(exact)
    everything = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    return Solution(grid, rounding.numbers.as_bytes(codes), everything)


def _length(rows: slice) -> float:
    return float(rows.stop - rows.start)


def _wrapped(operator: Operator) -> bool:
    """Whether what is quantized of it, or of a factor, meets other inputs than it does."""
    return any(part.moves_inputs for part in operator.inside())


def _apart(operator: Operator) -> tuple[int, ...]:
    """Columns of an operator that stay floats."""
    from ....runtime.schemes import WithColumns

    return tuple(operator.index.tolist()) if isinstance(operator, WithColumns) else ()


def _aim(operator: Operator, target: Tensor) -> tuple[Operator, Tensor]:
    """The part of an operator that meets its inputs as they come and is to be quantized, and what that aims at."""
    from ....runtime.schemes import Composite

    while isinstance(operator, Composite) and not operator.moves_inputs:
        target, operator = operator.aim(target), operator.inner
    return operator, target


def _leaf(operator: Operator) -> Operator:
    """What holds the numbers."""
    from ....runtime.schemes import Composite

    while isinstance(operator, Composite):
        operator = operator.inner
    return operator


def _replaced(operator: Operator, part: Operator, other: Operator) -> Operator:
    """An operator with another in place of one inside it."""
    from ....runtime.schemes import Composite

    if operator is part:
        return other
    assert isinstance(operator, Composite)
    return operator.with_inner(_replaced(operator.inner, part, other))


@dataclass(frozen=True)
class Solution:
    """int8 codes `[rows, columns]` on a grid, and for each row whether they are the nearest ones for want of better."""

    grid: Grid
    codes: Tensor
    simple: Tensor

    def part(self, rows: slice) -> Solution:
        """Of some rows."""
        return Solution(self.grid.rows(rows), self.codes[rows], self.simple[rows])

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """One solution of all rows."""
        import torch

        from ...solvers.grid import Grid

        codes, simple = (torch.cat(found) for found in zip(*((part.codes, part.simple) for part in parts), strict=True))
        return cls(Grid.stacked([part.grid for part in parts]), codes, simple)
