"""Linears of a stage by the input they read, and what is known of it: what calibrated passes solve with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....calibrate.stage import StageWork
from ....calibrate.statistics import HELD, Statistics
from ....kernels.dispatch import cpu_capability, products_dtype
from ....runtime.schemes import Composite, Dense, LowRank, Operator, WithColumns
from ...solvers.lowrank import refit_up
from ...solvers.refine import row_losses
from ...solvers.system import NotSolvable, System, damped_system
from .calibrated import ROWS, Calibrated

_LEAST = 1e-6  # share of the mean diagonal that columns without any are given
SystemOf = Callable[[Tensor, int], System]  # of a second moment over so many tokens


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
        """
        Args:
            rows: of all weights that are to be corrected.
        """
        if rows < cross.shape[0]:
            return cls(cross.to(system.factor.dtype), system)
        return cls(system.solve_right(cross), None)

    def moved(self, weight: Tensor) -> Tensor:
        """`W C H⁻¹` of `[rows, columns]`."""
        moved = weight.to(self.matrix.dtype) @ self.matrix
        return moved if self.system is None else self.system.solve_right(moved)


def held_out_share(weight: Tensor, fitted: Shift, moment: Tensor, cross: Tensor) -> float:
    """How much of a correction is best for tokens that it was not fitted to, and so, all tokens counted, for the rest.

    With `D = W C H⁻¹` of the other tokens, `‖W (x − x̃) − a D x̃‖²` over those that are held out is least for
    `a = tr(D (W C')ᵀ) / tr(D H' Dᵀ)`. What is noise in D falls with the number of tokens, so that a D fitted to all of
    them, 1 / (1 − h) times as many, deserves `1 / (1 + (1/a − 1) (1 − h))`.

    Args:
        weight: W `[rows, columns]`.
        fitted: to the tokens that are not held out.
        moment, cross: H' and C', of those that are.
    """
    dtype = fitted.matrix.dtype
    agrees = spread = 0.0
    for part in weight.split(ROWS):
        moved = fitted.moved(part)
        agrees += float((moved.float() * (part.to(dtype) @ cross.to(dtype)).float()).sum())
        spread += float((moved.float() * (moved @ moment.to(dtype)).float()).sum())
    if not 0 < agrees < float("inf") or not spread > 0:
        return 0.0
    return min(1.0, 1 / (1 + (spread / agrees - 1) * (1 - HELD)))


@dataclass(frozen=True)
class Group:
    """Linears that read the same input, and what is known of it.

    Attributes:
        names, operators, originals: of each linear; originals as the checkpoint stores them.
        tokens: rows that its statistics have seen.
        system: its second moment, damped and factored, or None where `reason` says why there is none.
        energy: float32 `[columns]`, the diagonal of the moment as it was measured (ones without a system).
        measured: that moment, nothing added to it; None without a system.
        shift: the correction for the errors of earlier layers, or None.
        alphas: how much of it is wanted for each linear.
        pruned: whether columns compete for what is kept, so that those without input are to be nothing.
    """

    names: list[str]
    operators: list[Operator]
    originals: list[Tensor]
    tokens: int
    system: System | None
    energy: Tensor
    measured: Tensor | None
    reason: str
    shift: Shift | None
    alphas: list[float]
    pruned: bool = False

    def part(self, numbers: Sequence[int]) -> Group:
        """Some of its linears."""
        return replace(
            self,
            names=[self.names[n] for n in numbers],
            operators=[self.operators[n] for n in numbers],
            originals=[self.originals[n] for n in numbers],
            alphas=[self.alphas[n] for n in numbers],
        )

    def without(self, columns: Sequence[int], act_order: bool) -> Group:
        """Its linears without some columns, which are solved for last, as floats.

        With the error D of all others, `tr((D E) H (D E)ᵀ)` is least for the columns' own `E = -D H_rc H_cc⁻¹`, and
        `D (H_rr - H_rc H_cc⁻¹ H_cr) Dᵀ` then: the moment that the others see is Schur's complement.
        """
        if not columns or self.system is None:
            return self
        moment, where = self.system.moment.double(), torch.tensor(columns, device=self.energy.device)
        cross = moment[where]
        factor = torch.linalg.cholesky(cross[:, where])
        moment = moment.addmm_(cross.T, torch.cholesky_solve(cross, factor), alpha=-1).to(self.system.moment.dtype)
        moment[where], moment[:, where] = 0, 0
        system = damped_system(moment, _LEAST, act_order=act_order)
        return replace(self, system=system, energy=self.energy.index_fill(0, where, 0))

    def alive(self, weight: Tensor) -> Tensor:
        """A weight `[rows, columns]` without the columns whose inputs were never anything but zero."""
        return weight * (self.energy > 0)

    def error(self, target: Tensor, result: Operator) -> float:
        """`tr(Δ H Δᵀ) / tr(V H Vᵀ)`, the relative error of outputs for inputs as they were measured, and counted,
        Δ what a linear that is stored differs in from its target V `[rows, columns]`; without a system, `‖Δ‖² / ‖V‖²`.
        """

        def loss(weight: Tensor) -> float:
            own = weight.square().sum(1) if self.measured is None else row_losses(weight.T, self.measured)
            return max(float(own.double().sum()), 0.0)

        parts = target.split(ROWS)
        missed = sum(loss(values - part) for part, values in zip(parts, _decoded(result), strict=True))
        return missed / max(sum(map(loss, parts)), 1e-30)

    def targets(self) -> list[Tensor]:
        """float32 weights to aim at, `[rows, columns]` each."""
        exact = [original.float() for original in self.originals]
        if self.pruned:
            exact = [self.alive(weight) for weight in exact]
        if self.shift is None:
            return exact
        rows = [len(weight) for weight in exact]
        moved = torch.cat([self.shift.moved(part) for part in torch.cat(exact).split(ROWS)]).split(rows)
        three = zip(exact, moved, self.alphas, strict=True)
        return [torch.add(weight, change, alpha=alpha) for weight, change, alpha in three]


def _decoded(operator: Operator) -> Iterator[Tensor]:
    """An operator's weight, `ROWS` at a time, for a head has many; of kinds that are taken apart, decoded in turn."""
    try:
        for start in range(0, operator.shape[0], ROWS):
            yield operator.rows(slice(start, start + ROWS)).dense()
    except NotImplementedError:
        yield from operator.dense().split(ROWS)


def seen(statistics: Statistics | None, operator: Operator) -> Statistics | None:
    """Statistics of what enters `inner` of an operator made of others, of what enters that."""
    if statistics is None or not isinstance(operator, Composite):
        return statistics
    sums = {"moment": operator.seen(statistics.moment)} if "moment" in statistics.sums else {}
    if "peak" in statistics.sums and isinstance(operator, WithColumns):
        sums["peak"] = operator.entering(statistics.sums["peak"])
    return Statistics(statistics.tokens, sums, statistics.lent)


def groups_of(
    step: Calibrated,
    work: StageWork,
    *,
    act_order: bool = False,
    together: int = 1,
    products: torch.dtype | None = None,
    pruned: bool = False,
) -> Iterator[Group]:
    """The stage's wanted linears by the input they read.

    Args:
        act_order, together: as of `damped_system`.
        pruned: as of `Group`.
        products: what the system is held and multiplied in; default: bfloat16 where the processor is fast at it.
    """
    products = products or products_dtype(cpu_capability())

    def system_of(moment: Tensor, tokens: int) -> System:
        share = step.shrinkage_for(len(moment), tokens)
        return damped_system(moment, step.damping, act_order=act_order, together=together, shrinkage=share)

    for members in work.groups:
        names = [name for name in members if step.wants(name)]
        if not names:
            continue
        group = replace(_group(step, work, names, system_of, products), pruned=pruned)
        whole = [number for number, name in enumerate(names) if not work.linears[name].factors]
        if whole:
            yield group.part(whole)
        for number in (n for n in range(len(names)) if n not in whole):
            yield from _factors(work, group.part([number]), system_of, products)


def _factors(work: StageWork, group: Group, system_of: SystemOf, products: torch.dtype) -> Iterator[Group]:
    """A low-rank linear's factors in the order in which they run, each a group of its own whose results, set in
    `work.linears` under the factor's name, are gathered again.

    `down` sees the linear's inputs; its errors count as they come out of `up`, whose columns are orthonormal. `up`
    sees `D x` and aims at the linear's own target.
    """
    [name], [target] = group.names, group.targets()
    operator, dtype = work.linears[name], group.originals[0].dtype
    assert isinstance(operator, LowRank)
    below, above = f"{name}.down", f"{name}.up"
    work.linears[below] = operator.down
    weight = operator.down.dense(dtype)
    yield replace(group, names=[below], operators=[operator.down], originals=[weight], shift=None)
    operator = replace(operator, down=work.linears.pop(below))
    if "up" in operator.factors:
        plain = isinstance(operator.up, Dense)  # a pattern that is there already would not survive being refitted
        weight, between = operator.up.dense(), None
        if group.system is not None:
            moment = group.system.moment.float()
            if plain:
                weight = refit_up(target, moment, operator.down.dense(), weight)
            between = Statistics(group.tokens, {"moment": operator.between(moment)})
        known = _known(between, system_of, weight, products, group.reason)
        if group.measured is not None:
            known["measured"] = operator.between(group.measured)
        work.linears[above] = Dense(weight.to(dtype)) if plain else operator.up
        yield replace(
            group, names=[above], operators=[work.linears[above]], originals=[weight.to(dtype)], shift=None, **known
        )
        operator = replace(operator, up=work.linears.pop(above))
    work.linears[name] = operator


def _group(
    step: Calibrated,
    work: StageWork,
    names: list[str],
    system_of: SystemOf,
    products: torch.dtype,
) -> Group:
    operators, originals = [work.linears[n] for n in names], [work.originals[n] for n in names]
    statistics = work.statistics.get(names[0])
    cross = None if statistics is None or "cross" not in step.needs else statistics.cross
    alphas = [0.0 if step.correction == "auto" else step.correction] * len(names)
    if step.correction == "auto" and statistics is not None and cross is not None:  # before there is another system
        alphas = _held_out_shares(statistics, originals, system_of, products)
    known = _known(statistics, system_of, originals[0], products, work.unseen)
    shift, system = None, known["system"]
    if system is not None and cross is not None:
        shift = Shift.of(cross, system, sum(len(original) for original in originals))
    return Group(names, operators, originals, shift=shift, alphas=alphas, **known)


def _held_out_shares(
    statistics: Statistics, originals: Sequence[Tensor], system_of: SystemOf, products: torch.dtype
) -> list[float]:
    """`held_out_share` of linears that read the same input."""
    sums = statistics.sums
    assert statistics.cross is not None
    try:
        seen = round((statistics.tokens + statistics.lent) * (1 - HELD))
        fit = system_of(statistics.moment - sums["held_moment"], seen).to(products)
    except NotSolvable:
        return [0.0] * len(originals)
    shift = Shift.of(statistics.cross - sums["held_cross"], fit, sum(len(original) for original in originals))
    held = sums["held_moment"], sums["held_cross"]
    return [held_out_share(original.float(), shift, *held) for original in originals]


def _known(
    statistics: Statistics | None,
    system_of: SystemOf,
    weight: Tensor,
    products: torch.dtype,
    reason: str,
) -> dict[str, Any]:
    """What a group knows of its inputs: tokens, system, energy, moment, and the reason where there is no system.

    Args:
        weight: `[rows, columns]` of one of its linears, on the device where it is solved.
        reason: why there is no system where there are no statistics.
    """
    tokens = 0 if statistics is None else statistics.tokens
    if statistics is not None and statistics.informed:
        if not statistics.moment.diagonal().any():
            reason = "its inputs were all zero"
        else:
            try:
                system = system_of(statistics.moment, statistics.tokens + statistics.lent).to(products)
                energy = statistics.moment.diagonal().clone()
                known = {"tokens": tokens, "system": system, "energy": energy, "reason": ""}
                return known | {"measured": statistics.moment}
            except NotSolvable as error:
                reason = str(error)
    energy = torch.ones(weight.shape[1], device=weight.device)
    return {"tokens": tokens, "system": None, "energy": energy, "measured": None, "reason": reason}
