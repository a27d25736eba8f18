"""What rtn and gptq share: the grid's options, and the operator a grid and its codes make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from ..base import LinearPass
from .calibrated import plain_floats

if TYPE_CHECKING:
    from torch import Tensor

    from ....runtime.schemes import Dense, Operator
    from ...solvers.grid import Grid


class Quantizer(LinearPass):
    """Options of every integer quantizer."""

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(4, description="bits of a code, scales not counted")
    group_size: int = Field(128, description="columns that share a scale: 16, 32, 64, 128 or 256; -1: one scale a row")
    symmetric: bool = Field(True, description="signed full-range scales; false: a zero point for each group")

    @field_validator("group_size")
    @classmethod
    def _known_size(cls, value: int) -> int:
        if value not in (-1, 16, 32, 64, 128, 256):
            raise ValueError("group_size is 16, 32, 64, 128, 256 or -1 (one scale a row)")
        return value

    def group_for(self, columns: int) -> int:
        """The group size that applies to a row of `columns`: a row shorter than a group is one group, -1."""
        return self.group_size if self.group_size <= columns else -1

    def planned(self, name: str, operator: Operator, group: Mapping[str, Dense]) -> Operator:
        """Codes, scales and zero points on `meta`, in the place of the plain floats of whatever holds them."""
        import torch

        from ....runtime.schemes import Composite
        from ...solvers.grid import Grid
        from ...solvers.numbers import Integers

        if isinstance(operator, Composite):
            return operator.with_inner(self.planned(name, operator.inner, group))
        dtype = plain_floats(self.kind, name, operator.numbers).weight.dtype
        rows, columns = operator.shape
        size = self.group_for(columns)
        scales = torch.empty(rows, 1 if size < 0 else -(-columns // size), dtype=dtype, device="meta")
        zeros = None if self.symmetric else scales
        grid = Grid(scales, zeros, Integers(self.bits), size, dtype)
        return quantized(torch.empty(rows, columns, dtype=torch.int8, device="meta"), grid, operator)


def quantized(codes: Tensor, grid: Grid, leaf: Operator) -> Operator:
    """An operator of plain numbers with codes `[rows, columns]` on a grid in their place."""
    import torch

    from ...solvers.numbers import Integers

    assert isinstance(grid.numbers, Integers)
    zeros = None if grid.zeros is None else grid.zeros.to(torch.int8)
    return leaf.coded(codes.to(torch.int8), grid.scales.to(grid.stored), zeros, grid.numbers.bits, grid.group_size)
