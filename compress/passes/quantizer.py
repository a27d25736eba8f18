"""What rtn and gptq share: the grid's options, and the operator a grid and its codes make."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ...runtime.errors import RecipeError
from ...runtime.operators import Dense, IntQuantized, Operator
from ..solvers.grid import Grid
from .base import Pass


class Quantizer(Pass):
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

    def plan(self, name: str, operator: Operator) -> Operator:
        """Codes, scales and zero points on `meta`; refuses what is quantized already or not stored as plain floats."""
        if not isinstance(operator, Dense):
            raise RecipeError(
                f"{self.step} cannot quantize {name}, which an earlier pass has quantized: let one of the two ignore it"
            )
        if operator.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            stored = str(operator.weight.dtype).removeprefix("torch.")
            raise RecipeError(
                f"{self.step} cannot quantize {name}: it is stored as {stored}; "
                "let the pass ignore it, or start from a bf16, fp16 or fp32 model"
            )
        rows, columns = operator.shape
        size = self.group_for(columns)
        groups = 1 if size < 0 else -(-columns // size)
        scales = torch.empty(rows, groups, dtype=operator.weight.dtype, device="meta")
        zeros = None if self.symmetric else scales.to(torch.int8)
        return IntQuantized(torch.empty(rows, columns, dtype=torch.int8, device="meta"), scales, zeros, self.bits, size)


def quantized(codes: Tensor, grid: Grid) -> IntQuantized:
    """The operator of float codes on a grid."""
    zeros = None if grid.zeros is None else grid.zeros.to(torch.int8)
    return IntQuantized(codes.to(torch.int8), grid.scales.to(grid.stored), zeros, grid.bits, grid.group_size)


def bits_per_weight(operator: IntQuantized) -> float:
    """Stored bits per weight, scales and zero points included."""
    columns, groups = operator.shape[1], operator.scales.shape[1]
    extra = operator.scales.element_size() * 8 + (0 if operator.zeros is None else operator.bits)
    shape = 128 / (operator.shape[0] * columns)  # two int64
    return operator.bits + extra * groups / columns + shape
