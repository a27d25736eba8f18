"""EoRA: make up at low rank for what compression took (arXiv:2410.21271).

Of all matrices of rank r, the one that brings the outputs closest, `min tr((Δ - U D) H (Δ - U D)ᵀ)` with Δ what is
missing, spans the leading eigenvectors of `Δ H Δᵀ`: `U` are these and `D = Uᵀ Δ`. (The paper gets there by way of H's
eigenvectors; the result is the same, and exact.) With `objective: model`, errors of outputs count by what they cost the
answers, `tr(M (Δ - U D) H (Δ - U D)ᵀ)` (`calibrate/curvature.py`): with `M = L Lᵀ`, it is the same for `Lᵀ Δ`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ....runtime.errors import RecipeError
from ...events import Event, Fallback, LayerDone
from ..base import Need
from .calibrated import Calibrated

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....runtime.schemes import Dense, Operator, WithResidual
    from .groups import Group

_NOT_TAKEN = {"dense": "nothing has compressed", "residual": "has a residual already"}  # by kind


class Eora(Calibrated):
    """Add a low-rank residual that makes up for the error of the passes before."""

    kind: Literal["eora"]
    rank: int | None = Field(None, ge=1, description="rank of the residual; give this or budget")
    budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="bytes of the residual's factors, as a share of the original weight's; give this or rank",
    )
    objective: Literal["layer", "model"] = Field(
        "layer",
        description="what the residual makes up for: layer: errors of the linear's own outputs; model: what they cost "
        "the answers, found by a walk back from the model's end, but for experts' first linears and what has more rows "
        "than two hidden sizes",
    )
    factor_bits: Literal[8, 16] = Field(
        16,
        description="bits of a number in the residual's factors; 16: floats as the model's; 8: integers with a scale a "
        "row",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Eora:
        if (self.rank is None) == (self.budget is None):
            raise ValueError("give either rank or budget")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | ({"curvature"} if self.objective == "model" else set())

    def rank_for(self, rows: int, columns: int, itemsize: int) -> int:
        """The rank that applies to a weight `[rows, columns]` of so many bytes an element."""
        if self.rank is not None:
            return min(self.rank, rows, columns)
        assert self.budget is not None
        fixed = 0
        each = (rows + columns) * itemsize
        if self.factor_bits == 8:
            fixed, each = rows * itemsize + 32, rows + columns + itemsize
        rank = min(int((self.budget * rows * columns * itemsize - fixed) / each), rows, columns)
        return rank - rank % 4 if self.factor_bits == 8 else rank  # four codes share a word

    def plan(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        """The operator with its residual, on `meta`.

        Raises:
            RecipeError: nothing was compressed, the budget is less than one rank, or the result is larger than the
                weight was.
        """
        if why := _NOT_TAKEN.get(operator.kind):
            raise RecipeError(f"{self.kind} cannot take {name}, which {why}: put it after one other pass, once")
        if operator.factors:
            raise RecipeError(f"{self.kind} cannot take {name}, whose latents are to be cached; let it ignore it")
        rows, columns = operator.shape
        dtype = _float_dtype(operator)
        before = rows * columns * dtype.itemsize
        rank = self.rank_for(rows, columns, dtype.itemsize)
        if rank < 1:
            raise RecipeError(f"{self.kind}: the budget {self.budget} is less than one rank of {name}; raise it")
        result = self._outline(operator, rank, dtype)
        if result.nbytes >= before:
            pays = next((r for r in range(rank, 0, -1) if self._outline(operator, r, dtype).nbytes < before), 0)
            hint = f"the largest rank that pays is {pays}" if pays else "none pays: ignore it"
            raise RecipeError(
                f"{self.kind}: with rank {rank}, {name} takes {result.nbytes:,.0f} bytes, not less than its "
                f"{before:,}; {hint}"
            )
        return result

    def _outline(self, operator: Operator, rank: int, dtype: torch.dtype) -> WithResidual:
        import torch

        from ....runtime.schemes import LowRank, WithResidual

        up = torch.empty(operator.shape[0], rank, dtype=dtype, device="meta")
        down = torch.empty(rank, operator.shape[1], dtype=dtype, device="meta")
        return WithResidual(operator, LowRank(self._stored(up), self._stored(down)))

    def _stored(self, part: Tensor) -> Operator:
        from ...solvers.stored_factors import stored_rows

        return stored_rows(part, part.dtype, self.factor_bits)

    def flops(self, rows: int, columns: int) -> float:
        small = min(rows, columns)
        return 2.0 * columns**3 + 2.0 * rows * columns**2 + self.correcting(rows, columns) + 30.0 * small**3

    def memory(self, operators: Sequence[Operator]) -> float:
        shapes = [operator.shape for operator in operators]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        small = max(min(shape) for shape in shapes)
        largest = max(shape[0] for shape in shapes)
        solving = 8.0 * rows * columns + 24.0 * largest * columns + 32.0 * small**2
        if self.objective == "model":  # the metric, its factor in float64, and what that makes of the error
            solving += 20.0 * largest**2 + 16.0 * largest * columns
        return max(self.factoring(columns), 8.0 * columns**2 + solving)

    def apply(self, work: StageWork) -> Iterator[Event]:
        import torch

        from .groups import groups_of

        for group in groups_of(self, work, products=torch.float32, pruned=True):
            for number, target in enumerate(group.targets()):
                yield from self._apply_one(work, group, number, target)

    def _apply_one(self, work: StageWork, group: Group, number: int, target: Tensor) -> Iterator[Event]:
        import torch

        from ....runtime.schemes import LowRank, WithResidual
        from ...solvers.coupled import coupled_losses, metric_of
        from ...solvers.lowrank import best_low_rank, refit_up
        from ...solvers.refine import row_losses

        name, operator, dtype = group.names[number], group.operators[number], group.originals[number].dtype
        rows, columns = operator.shape
        moment = group.system.moment.float() if group.system else torch.eye(columns, device=target.device)
        missing = group.alive(target - operator.dense())
        rank = self.rank_for(rows, columns, dtype.itemsize)
        coupled = self.objective == "model" and group.system is not None
        metric = metric_of(work.curvatures.get(name)) if coupled else None
        up, down = best_low_rank(missing, moment, rank, metric)
        below = self._stored(down.to(dtype))
        above = self._stored(refit_up(missing, moment, below.dense(), up).to(dtype))
        result = WithResidual(operator, LowRank(above, below))
        rest = missing - result.residual.dense()

        def loss(error: Tensor) -> Tensor:
            own = row_losses if metric is None else partial(coupled_losses, metric=metric)
            return own(error.T, moment).double().sum()

        if group.reason:
            yield Fallback(name, self.kind, f"as if all inputs mattered alike, for {group.reason}")
        if not loss(rest) < loss(missing):  # rounding can eat what little there was to gain
            rest, result = missing, WithResidual(operator, LowRank(self._stored(0 * up.to(dtype)), below))
            yield Fallback(name, self.kind, "a residual of zeros, for there was nothing to make up for")
        work.linears[name] = result
        yield LayerDone.of(name, self.kind, group.error(target, result), result, group.tokens)


def _float_dtype(operator: Operator) -> torch.dtype:
    """What the operator's scales or values are stored in, and the original weight was."""
    floats = (tensor.dtype for tensor in operator.to_tensors().values() if tensor.dtype.is_floating_point)
    return next(dtype for dtype in floats if dtype.itemsize > 1)  # where codes are floats too
