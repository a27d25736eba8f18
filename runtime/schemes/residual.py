"""What compression left out of an operator, kept beside it at low rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Composite, Operator, below, build, from_tensors, prefixed, register, shared
from .dense import DenseLinear
from .linear import StoredLinear
from .lowrank import LowRank, LowRankLinear


@dataclass(frozen=True)
class WithResidual(Composite):
    """`W = base + residual`: what compression left out of `base`, kept at low rank."""

    kind: ClassVar[str] = "residual"
    ends: ClassVar[tuple[str, ...]] = ("base", "residual")
    base: Operator
    residual: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def nbytes(self) -> float:
        return self.base.nbytes + self.residual.nbytes

    @property
    def inner(self) -> Operator:
        return self.base

    def with_inner(self, inner: Operator) -> WithResidual:
        return WithResidual(inner, self.residual)

    def aim(self, target: Tensor) -> Tensor:
        """What the residual leaves."""
        return target - self.residual.dense(target.dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.base.dense(exact) + self.residual.dense(exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base.forward(x) + self.residual.forward(x)

    def beyond(self, x: Tensor) -> Tensor:
        if any(part.rounds_activations for part in self.residual.inside()):
            return super().beyond(x)
        return self.base.beyond(x)

    @property
    def description(self) -> str:
        return f"{self.base.description} + {self.residual.description}"

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.base.to_tensors(), "base"), **prefixed(self.residual.to_tensors(), "residual")}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "base": self.base.scheme(), "residual": self.residual.scheme()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> WithResidual:
        base = from_tensors({**below(tensors, "base"), **shared(tensors)}, scheme["base"])
        residual = LowRank.from_tensors(below(tensors, "residual"), scheme["residual"])
        return cls(base, residual)


class ResidualLinear(StoredLinear):
    """A linear in stored form, and beside it a low-rank one."""

    base: StoredLinear
    residual: LowRankLinear

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        base = build({**below(tensors, "base"), **shared(tensors)}, scheme["base"], dtype)
        super().__init__(base.out_features, base.in_features)
        self.base = base
        self.residual = LowRankLinear(below(tensors, "residual"), scheme["residual"], dtype)

    def product(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        if up is None and self.residual.groups == 1 and type(self.residual.up) is DenseLinear:
            return self.base.affine(x, bias, self.residual.up.matrix.to(x.dtype), self.residual.down.product(x))
        return self.base.affine(x, bias, up, down) + self.residual.product(x)


register(WithResidual, ResidualLinear)
