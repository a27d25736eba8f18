"""Low-rank maps, on their own or beside another operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Operator, Problem, below, prefixed, shared


@dataclass(frozen=True)
class LowRank:
    """`W = up down`.

    Attributes:
        up: an operator `[out_features, rank]`.
        down: an operator `[rank, in_features]`.
    """

    kind: ClassVar[str] = "lowrank"
    up: Operator
    down: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> float:
        return self.up.nbytes + self.down.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.up.dense(exact) @ self.down.dense(exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.up.forward(self.down.forward(x))

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.up.to_tensors(), "up"), **prefixed(self.down.to_tensors(), "down")}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "rank": self.rank, "up": self.up.scheme(), "down": self.down.scheme()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Callable[..., Operator]
    ) -> LowRank:
        return cls(inner(below(tensors, "up"), scheme["up"]), inner(below(tensors, "down"), scheme["down"]))


@dataclass(frozen=True)
class WithResidual:
    """`W = base + residual`: what compression left out of `base`, kept at low rank."""

    kind: ClassVar[str] = "residual"
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

    def subproblem(self, problem: Problem) -> Problem:
        """The base's: it aims at what the residual leaves."""
        return Problem(problem.target - self.residual.dense(problem.target.dtype), problem.moment, problem.metric)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.base.dense(exact) + self.residual.dense(exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base.forward(x) + self.residual.forward(x)

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.base.to_tensors(), "base"), **prefixed(self.residual.to_tensors(), "residual")}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "base": self.base.scheme(), "residual": self.residual.scheme()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Callable[..., Operator]
    ) -> WithResidual:
        base = inner({**below(tensors, "base"), **shared(tensors)}, scheme["base"])
        residual = LowRank.from_tensors(below(tensors, "residual"), scheme["residual"], inner)
        return cls(base, residual)
