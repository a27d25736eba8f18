"""8-bit weights for products of 8-bit numbers: when the model runs, inputs are rounded too, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ...events import Event, LayerDone
from ..base import LinearPass
from .calibrated import ROWS, plain_floats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ....calibrate.stage import StageWork
    from ....runtime.schemes import W8A8, Dense, Operator


class W8A8Pass(LinearPass):
    """Round weights to 8 bits, one scale a row; inputs meet them in 8 bits, one scale a token, found as they come."""

    kind: Literal["w8a8"]
    type: Literal["int", "float"] = Field(
        "int",
        description="int8; or float8_e4m3, which bears outliers among the inputs, and needs a GPU of compute "
        "capability 8.9 to be fast",
    )

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        import torch

        from ....runtime.schemes import W8A8

        weight = plain_floats(self.kind, name, operator).weight
        codes = torch.empty(weight.shape, dtype=self._codes, device="meta")
        return W8A8(codes, torch.empty(len(weight), 1, dtype=weight.dtype, device="meta"))

    @property
    def _codes(self) -> torch.dtype:
        import torch

        return torch.int8 if self.type == "int" else torch.float8_e4m3fn

    def flops(self, rows: int, columns: int) -> float:
        return 10.0 * rows * columns

    def memory(self, operators: Sequence[Operator]) -> float:
        shapes = [operator.shape for operator in operators]
        return max(15.0 * min(rows, ROWS) * columns + 1.0 * max(0, rows - ROWS) * columns for rows, columns in shapes)

    def apply(self, work: StageWork) -> Iterator[Event]:
        for name, operator in list(work.linears.items()):
            if self.wants(name):
                result, error = self._rounded(operator, work.originals[name].dtype)
                work.linears[name] = result
                yield LayerDone.of(name, self.kind, error, result, 0)

    def _rounded(self, operator: Operator, stored: torch.dtype) -> tuple[Operator, float]:
        """The operator, its floats rounded, and the share of their squares that is lost."""
        import torch

        from ....runtime.schemes import W8A8, Dense, with_factors

        if operator.factors:
            parts = {part: self._rounded(getattr(operator, part), stored) for part in operator.factors}
            whole = with_factors(operator, **{part: result for part, (result, _) in parts.items()})
            return whole, max(error for _, error in parts.values())
        assert isinstance(operator, Dense)
        pieces, lost, scale = list[W8A8](), 0.0, 0.0
        for rows in operator.weight.split(ROWS):
            exact = rows.float()
            pieces.append(part := self._nearest(exact, stored))
            lost += float((part.dense() - exact).square().sum())
            scale += float(exact.square().sum())
        codes, scales = torch.cat([piece.codes for piece in pieces]), torch.cat([piece.scales for piece in pieces])
        return W8A8(codes, scales), lost / max(scale, 1e-30)

    def _nearest(self, weight: Tensor, stored: torch.dtype) -> W8A8:
        import torch

        from ....runtime.schemes import W8A8
        from ...solvers.grid import range_grid, storable
        from ...solvers.numbers import E4M3

        if self.type == "int":
            grid = range_grid(weight, 8, -1, True, stored)
            return W8A8(grid.codes(weight).to(torch.int8), grid.scales.to(stored))
        scales = storable(weight.abs().amax(1, keepdim=True) / E4M3.high, stored)
        return W8A8(E4M3.nearest(weight / scales).to(torch.float8_e4m3fn), scales.to(stored))
