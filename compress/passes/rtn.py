"""Round to nearest: no data, seconds; with `search`, ranges chosen on calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ...calibrate.walk import StageWork
from ...runtime.operators import Dense
from ..events import Event, LayerDone
from ..solvers.grid import range_grid, searched_grid
from .base import Need
from .quantizer import Quantizer, bits_per_weight, quantized


class Rtn(Quantizer):
    """Quantize each weight to the nearest value of its group's grid."""

    step: ClassVar[str] = "rtn"
    kind: Literal["rtn"]
    search: bool = Field(
        False, description="choose each group's range to minimise the error weighted by the inputs' second moments"
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"} if self.search else ())

    def flops(self, rows: int, columns: int) -> float:
        return (600.0 if self.search else 10.0) * rows * columns

    def memory(self, shapes: Sequence[tuple[int, int]]) -> float:
        return max(22.0 * rows * columns for rows, columns in shapes)

    def apply(self, work: StageWork) -> Iterator[Event]:
        for name, operator in list(work.linears.items()):
            if not self.wants(name):
                continue
            assert isinstance(operator, Dense)
            weight = operator.weight.float()
            options = (self.bits, self.group_for(weight.shape[1]), self.symmetric, operator.weight.dtype)
            importance = torch.ones(weight.shape[1])
            tokens = 0
            if name in work.statistics:
                importance, tokens = work.statistics[name].moment.diagonal().clone(), work.statistics[name].tokens
            if self.search and tokens:
                grid = searched_grid(weight, importance, *options)
            else:
                grid = range_grid(weight, *options)
            codes = grid.codes(weight)
            result = quantized(codes, grid)
            work.linears[name] = result
            error = (grid.values(codes) - weight).square().mul_(importance).sum() / (
                weight.square().mul_(importance).sum().clamp(min=torch.finfo(torch.float32).tiny)
            )
            yield LayerDone(name, self.step, float(error), bits_per_weight(result), tokens)
