"""2:4 sparsity: of four neighbours in a row two are stored, and where they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import layouts
from .base import Operator, below, prefixed


@dataclass(frozen=True)
class Sparse24:
    """Two of every four columns.

    Attributes:
        values: an operator `[out_features, in_features / 2]`: the kept ones from left to right. Its groups of columns
            that share a scale are half as wide as those of the columns they came from.
        indices: uint8 `[out_features, in_features / 4]`, `first | second << 2` with first < second in 0..3.
    """

    kind: ClassVar[str] = "sparse24"
    values: Operator
    indices: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, kept = self.values.shape
        return rows, 2 * kept

    @property
    def nbytes(self) -> float:
        return self.values.nbytes + layouts.packed_indices(self.indices.shape[1]) * self.shape[0]

    @property
    def keep(self) -> Tensor:
        """bool `[out_features, in_features]`: which columns are stored."""
        return layouts.kept24(self.indices)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return layouts.expand24(self.values.dense(dtype), self.indices)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype))

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.values.to_tensors(), "values"), "indices": layouts.pack_indices(self.indices)}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": self.values.scheme()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Callable[..., Operator]
    ) -> Sparse24:
        values = inner(below(tensors, "values"), scheme["values"])
        return cls(values, layouts.unpack_indices(tensors["indices"], values.shape[1] // 2))
