"""A plain matrix, as the original model has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import cpu
from .base import Operator, register
from .linear import RowsLinear


@dataclass(frozen=True)
class Dense(Operator):
    """A plain weight `[out_features, in_features]`."""

    kind: ClassVar[str] = "dense"
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> float:
        return self.weight.numel() * self.weight.element_size()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    @property
    def description(self) -> str:
        return self.kind

    def coded(self, stored: Operator) -> Operator:
        return stored

    @property
    def scales_rows(self) -> bool:
        return True

    def rows_times(self, scale: Tensor) -> Dense:
        return Dense((self.weight.float() * scale[:, None]).to(self.weight.dtype))

    def rows(self, which: Tensor | slice) -> Dense:
        return Dense(self.weight[which])

    def to_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Dense:
        return cls(tensors["weight"])


class DenseLinear(RowsLinear):
    """A plain matrix."""

    matrix: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        rows, columns = tensors["weight"].shape
        super().__init__(rows, columns)
        self.register_buffer("matrix", tensors["weight"].to(dtype), persistent=False)

    def decode(self, rows: slice, dtype: torch.dtype, scratch: cpu.Scratch | None = None) -> Tensor:
        return self.matrix[rows].to(dtype)

    def tiled(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype))


register(Dense, DenseLinear)
