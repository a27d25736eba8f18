"""What the passes share that solve for a weight on calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from ...calibrate.statistics import Statistics
from ...calibrate.walk import StageWork
from ...kernels.dispatch import cpu_capability, products_dtype
from ...runtime.errors import RecipeError
from ...runtime.operators import Dense, Operator
from ..solvers.system import NotSolvable, System, damped_system
from .base import Need, Pass

ROWS = 4096  # solved at a time: memory is bounded, and GEMMs are large enough


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


@dataclass(frozen=True)
class Group:
    """Linears that read the same input, and what is known of it.

    Attributes:
        names, operators, originals: of each linear; originals as the checkpoint stores them.
        tokens: rows that its statistics have seen.
        system: its second moment, damped and factored, or None where `reason` says why there is none.
        energy: float32 `[columns]`, the diagonal of the moment as it was measured (ones without a system).
        shift: the correction for the errors of earlier layers, or None.
        alpha: how much of it is wanted.
        pruned: whether columns compete for what is kept, so that those without input are to be nothing.
    """

    names: list[str]
    operators: list[Operator]
    originals: list[Tensor]
    tokens: int
    system: System | None
    energy: Tensor
    reason: str
    shift: Shift | None
    alpha: float
    pruned: bool = False

    def alive(self, weight: Tensor) -> Tensor:
        """A weight `[rows, columns]` without the columns whose inputs were never anything but zero."""
        return weight * (self.energy > 0)

    def targets(self) -> list[Tensor]:
        """float32 weights to aim at, `[rows, columns]` each."""
        exact = [original.float() for original in self.originals]
        if self.pruned:
            exact = [self.alive(weight) for weight in exact]
        if self.shift is None:
            return exact
        parts = (self.shift.corrected(part, self.alpha) for part in torch.cat(exact).split(ROWS))
        return list(torch.cat(list(parts)).split([len(weight) for weight in exact]))


class Calibrated(Pass):
    """Options of every pass that solves on calibration data."""

    correction: float = Field(
        1.0, ge=0, le=1, description="how much of the error of earlier layers to make up for (α); 0: none"
    )
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

    def groups(
        self,
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
        for members in work.groups:
            names = [name for name in members if self.wants(name)]
            if not names:
                continue
            operators, originals = [work.linears[n] for n in names], [work.originals[n] for n in names]
            statistics = work.statistics.get(names[0])
            group = self._group(names, operators, originals, statistics, act_order, together, products)
            yield replace(group, pruned=pruned)

    def _group(
        self,
        names: list[str],
        operators: list[Operator],
        originals: list[Tensor],
        statistics: Statistics | None,
        act_order: bool,
        together: int,
        products: torch.dtype,
    ) -> Group:
        reason, system, tokens = "", None, 0 if statistics is None else statistics.tokens
        if statistics is None or not tokens:
            reason = "no calibration token came by (more data.samples?)"
        elif not statistics.moment.diagonal().any():
            reason = "its inputs were all zero"
        else:
            try:
                system = damped_system(statistics.moment, self.damping, act_order=act_order, together=together)
            except NotSolvable as error:
                reason = str(error)
        if statistics is None or system is None:
            ones = torch.ones(originals[0].shape[1])
            return Group(names, operators, originals, tokens, None, ones, reason, None, 0.0)
        system = system.to(products)
        shift = None
        if self.correction and statistics.cross is not None:
            shift = Shift.of(statistics.cross, system, sum(len(original) for original in originals))
        energy = statistics.moment.diagonal().clone()
        return Group(names, operators, originals, tokens, system, energy, reason, shift, self.correction)


def plain_floats(step: str, name: str, operator: Operator) -> Dense:
    """The operator of a linear that nothing has compressed, stored as plain floats.

    Raises:
        RecipeError: it is not.
    """
    if not isinstance(operator, Dense):
        raise RecipeError(
            f"{step} cannot take {name}, which an earlier pass has compressed: let one of the two ignore it, or change "
            "their order"
        )
    if operator.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        stored = str(operator.weight.dtype).removeprefix("torch.")
        raise RecipeError(
            f"{step} cannot take {name}: it is stored as {stored}; "
            "let the pass ignore it, or start from a bf16, fp16 or fp32 model"
        )
    return operator


def relative(losses: Tensor, scale: Tensor) -> float:
    """The share of `scale` `[rows]` that is lost."""
    return float(losses.double().sum() / scale.double().sum().clamp(min=1e-30))
