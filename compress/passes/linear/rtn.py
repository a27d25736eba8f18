"""Round to nearest: no data, seconds; with `search`, ranges chosen on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...events import Event, LayerDone
from ..base import Need
from .calibrated import ROWS
from .quantizer import Quantizer, quantized

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....runtime.schemes import Operator


class Rtn(Quantizer):
    """Quantize each weight to the nearest value of its group's grid."""

    kind: Literal["rtn"]
    search: bool = Field(
        False, description="choose each group's range to minimise the error weighted by the inputs' second moments"
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "moment"} if self.search else ())

    def flops(self, rows: int, columns: int) -> float:
        return (600.0 if self.search else 10.0) * rows * columns

    def memory(self, operators: Sequence[Operator]) -> float:
        return max(
            22.0 * min(rows, ROWS) * columns + (1.0 if operator.kind == "int" else 5.0) * max(0, rows - ROWS) * columns
            for operator in operators
            for rows, columns in [operator.shape]
        )

    def apply(self, work: StageWork) -> Iterator[Event]:
        for name, operator in list(work.linears.items()):
            if not self.wants(name):
                continue
            statistics = work.statistics.get(name)
            if statistics is not None and not statistics.informed:
                statistics = None
            result, error = self._rounded(operator, statistics, work.originals[name].dtype)
            work.linears[name] = result
            yield LayerDone.of(name, self.kind, error, result, statistics.tokens if statistics else 0)

    def _rounded(
        self, operator: Operator, statistics: Statistics | None, stored: torch.dtype
    ) -> tuple[Operator, float]:
        """The operator, its floats rounded, and their relative error weighted by what they meet where that is known."""
        import torch

        from ....runtime.schemes import Composite, Dense, with_factors
        from ...solvers.grid import Grid, range_grid, searched_grid

        if operator.factors:
            most = 0.0
            for number, part in enumerate(operator.factors):
                if number and statistics is not None:
                    statistics = _seen(statistics, operator.between)
                result, error = self._rounded(getattr(operator, part), statistics, stored)
                operator, most = with_factors(operator, **{part: result}), max(most, error)
            return operator, most
        if isinstance(operator, Composite):
            if statistics is not None:
                statistics = _seen(statistics, operator.seen)
            inner, error = self._rounded(operator.inner, statistics, stored)
            return operator.with_inner(inner), error
        weight = operator.weight if isinstance(operator, Dense) else operator.dense()
        options = (self.bits, self.group_for(weight.shape[1]), self.symmetric, stored)
        importance = torch.ones(weight.shape[1], device=weight.device)
        if statistics is not None:
            importance = statistics.moment.diagonal().clone()
        grids, codes, lost, scale = [], [], 0.0, 0.0
        for rows in weight.split(ROWS):
            exact = rows.float()
            searched = self.search and statistics is not None
            grid = searched_grid(exact, importance, *options) if searched else range_grid(exact, *options)
            nearest = grid.codes(exact)
            lost += float((grid.values(nearest) - exact).square().mul_(importance).sum())
            scale += float(exact.square().mul_(importance).sum())
            grids.append(grid)
            codes.append(nearest.to(torch.int8))
        relative = lost / max(scale, torch.finfo(torch.float32).tiny)
        return quantized(torch.cat(codes), Grid.stacked(grids), operator), relative


def _seen(statistics: Statistics, moved: Callable[[Tensor], Tensor]) -> Statistics:
    """Statistics of what a part of an operator meets."""
    from ....calibrate.statistics import Statistics

    return Statistics(statistics.tokens, {"moment": moved(statistics.moment)}, statistics.lent)
