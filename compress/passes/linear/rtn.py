"""Round to nearest: no data, seconds; with `search`, ranges chosen on calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ...events import Event, Fallback, LayerDone
from ..base import Need
from .calibrated import ROWS
from .quantizer import SCHEMES, Quantizer

if TYPE_CHECKING:
    from ....calibrate.stage import StageWork
    from ....calibrate.statistics import Statistics
    from ....runtime.schemes import Operator
    from ...solvers.grid import Steps


class Rtn(Quantizer):
    """Quantize each weight to the nearest value of its group's grid."""

    apart: ClassVar[bool] = True
    kind: Literal["rtn"]
    search: bool = Field(
        False, description="choose each group's range to minimise the error weighted by the inputs' second moments"
    )

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | frozenset({"reference", "moment"} if self.search else ())

    def flops(self, rows: int, columns: int) -> float:
        return (600.0 if self.search else 10.0) * rows * columns

    def memory(self, operators: Sequence[Operator]) -> float:
        return max(self._memory(operator) for operator in operators)

    def _memory(self, operator: Operator) -> float:
        from ....kernels.numbers import ROUNDINGS, Integers

        rows, columns = operator.shape
        # Floats are rounded by their exponents; the whole weight is decoded of what an earlier pass has compressed.
        scheme = SCHEMES[self.scheme].weights
        at_hand = 22.0 if scheme is None or isinstance(ROUNDINGS[scheme].numbers, Integers) else 38.0
        others = 1.0 if operator.kind in ("dense", "int", "w8a8", "block_scaled") else 5.0
        return at_hand * min(rows, ROWS) * columns + others * max(0, rows - ROWS) * columns

    def apply(self, work: StageWork) -> Iterator[Event]:
        for names in work.groups:
            wanted = [name for name in names if self.wants(name)]
            if not wanted:
                continue
            originals = [work.originals[name] for name in wanted]
            for name, original in zip(wanted, originals, strict=True):
                steps = self.steps(originals, self.rounding(original.shape[1], name), original.dtype)
                statistics = work.statistics.get(name)
                if statistics is not None and not statistics.met:
                    statistics = None
                if self.search and statistics is None:
                    yield Fallback(name, self.kind, f"searched as if all inputs mattered alike, for {work.unseen}")
                result, error = self._rounded(name, work.linears[name], statistics, steps)
                work.linears[name] = result
                yield LayerDone.of(name, self.kind, error, result, statistics.tokens if statistics else 0)

    def _rounded(
        self, name: str, operator: Operator, statistics: Statistics | None, steps: Steps
    ) -> tuple[Operator, float]:
        """The operator, its floats rounded, and their relative error weighted by what they meet where that is known."""
        import torch

        from ....calibrate.statistics import Statistics
        from ....runtime.schemes import Composite, Dense, with_factors
        from ...solvers.grid import RANGES, Grid, searched_grid
        from .groups import seen

        if operator.factors:
            most = 0.0
            for number, part in enumerate(operator.factors):
                if number and statistics is not None:
                    known = {"moment": operator.between(statistics.moment)} if statistics.informed else {}
                    statistics = Statistics(statistics.tokens, known, statistics.lent)
                factor = getattr(operator, part)
                own = steps
                if steps.dtype.itemsize == 1:
                    own = self.steps([factor.dense()], self.rounding(factor.shape[1], name), steps.dtype)
                result, error = self._rounded(name, factor, statistics, own)
                operator, most = with_factors(operator, **{part: result}), max(most, error)
            return operator, most
        if isinstance(operator, Composite):
            inner, error = self._rounded(name, operator.inner, seen(statistics, operator), steps)
            return operator.with_inner(inner), error
        weight = operator.weight if isinstance(operator, Dense) else operator.dense()
        rounding = self.rounding(weight.shape[1], name)
        importance, ranges = torch.ones(weight.shape[1], device=weight.device), RANGES[rounding.scales]
        if statistics is not None and "moment" in statistics.sums:
            importance = statistics.moment.diagonal().clone()
            if self.search and not steps.coarse:
                ranges = tuple(share * wide for wide in ranges for share in torch.linspace(1.1, 0.4, 57).tolist())
        grids, codes, lost, scale = [], [], 0.0, 0.0
        for rows in weight.split(ROWS):
            exact = rows.float()
            grid = searched_grid(exact, importance, rounding, steps, ranges)
            nearest = grid.codes(exact)
            lost += float((grid.values(nearest) - exact).square().mul_(importance).sum())
            scale += float(exact.square().mul_(importance).sum())
            grids.append(grid)
            codes.append(rounding.numbers.as_bytes(nearest))
        relative = lost / max(scale, torch.finfo(torch.float32).tiny)
        return self.quantized(torch.cat(codes), Grid.stacked(grids), operator, statistics), relative
