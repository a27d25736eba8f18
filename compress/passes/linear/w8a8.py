"""8-bit weights for products of 8-bit numbers: when the model runs, inputs are rounded too, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from ....calibrate.stage import StageWork
from ....runtime.schemes import W8A8, Dense, Operator, with_factors
from ...events import Event, LayerDone
from ...solvers.grid import range_grid, storable
from ..base import LinearPass
from .calibrated import plain_floats

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class W8A8Pass(LinearPass):
    """Round weights to 8 bits, one scale a row; inputs meet them in 8 bits, one scale a token, found as they come."""

    kind: Literal["w8a8"]
    type: Literal["int", "float"] = Field(
        "int",
        description="int8; or float8_e4m3, which bears outliers among the inputs, and needs a GPU of compute "
        "capability 8.9 to be fast",
    )

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        weight = plain_floats(self.kind, name, operator).weight
        codes = torch.empty(weight.shape, dtype=self._codes, device="meta")
        return W8A8(codes, torch.empty(len(weight), 1, dtype=weight.dtype, device="meta"))

    @property
    def _codes(self) -> torch.dtype:
        return torch.int8 if self.type == "int" else torch.float8_e4m3fn

    def flops(self, rows: int, columns: int) -> float:
        return 10.0 * rows * columns

    def memory(self, operators: Sequence[Operator]) -> float:
        return max(15.0 * rows * columns for rows, columns in (operator.shape for operator in operators))

    def apply(self, work: StageWork) -> Iterator[Event]:
        for name, operator in list(work.linears.items()):
            if self.wants(name):
                result, error = self._rounded(operator, work.originals[name].dtype)
                work.linears[name] = result
                yield LayerDone.of(name, self.kind, error, result, 0)

    def _rounded(self, operator: Operator, stored: torch.dtype) -> tuple[Operator, float]:
        """The operator, its floats rounded, and the share of their squares that is lost."""
        if operator.factors:
            parts = {part: self._rounded(getattr(operator, part), stored) for part in operator.factors}
            whole = with_factors(operator, **{part: result for part, (result, _) in parts.items()})
            return whole, max(error for _, error in parts.values())
        weight = operator.dense()
        if self.type == "int":
            grid = range_grid(weight, 8, -1, True, stored)
            result = W8A8(grid.codes(weight).to(torch.int8), grid.scales.to(stored))
        else:
            scales = storable(weight.abs().amax(1, keepdim=True) / LARGEST, stored)
            codes = (weight / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            result = W8A8(codes, scales.to(stored))
        lost = (result.dense() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        return result, float(lost)
