"""ARMOR: a matrix as block-diagonal × sparse core × block-diagonal (arXiv 2510.05528)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.reference import block_diagonal
from .base import Operator, Problem, below, prefixed, shared


@dataclass(frozen=True)
class Armor:
    """`W = A S B` with A and B block-diagonal.

    Attributes:
        a: an operator `[out_features, block]` whose rows are those of the blocks of A, one block below the other.
        core: S, an operator `[out_features, in_features]`.
        b: like a, `[in_features, block]`.
        shared: a name if B is stored once for several linears that read the same input.
        sharers: how many they are.
    """

    kind: ClassVar[str] = "armor"
    a: Operator
    core: Operator
    b: Operator
    shared: str | None = None
    sharers: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.core.shape

    @property
    def block_sizes(self) -> list[int]:
        """Of A and of B."""
        return [self.a.shape[1], self.b.shape[1]]

    @property
    def nbytes(self) -> float:
        return self.a.nbytes + self.core.nbytes + self.b.nbytes / self.sharers

    @property
    def inner(self) -> Operator:
        return self.core

    def with_inner(self, inner: Operator) -> Armor:
        return Armor(self.a, inner, self.b, self.shared, self.sharers)

    def blocks(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A and B as `[blocks, block, block]`."""
        left, right = self.a.dense(dtype), self.b.dense(dtype)
        return left.view(-1, left.shape[1], left.shape[1]), right.view(-1, right.shape[1], right.shape[1])

    def subproblem(self, problem: Problem) -> Problem:
        """The core's: inputs `B x` have the moment `B H Bᵀ`, its outputs matter by `Aᵀ M A`, and `A⁻¹ T B⁻¹` would be
        exact. In float64; A and B have to be invertible."""
        left, right = self.blocks(torch.float64)
        target, moment = problem.target.double(), problem.moment.double()
        target = torch.linalg.solve(left, target.view(*left.shape[:2], -1)).reshape(target.shape)
        target = torch.linalg.solve(right.mT, target.T.reshape(*right.shape[:2], -1)).reshape(target.T.shape).T
        metric = left.mT @ left if problem.metric is None else left.mT @ problem.metric.double() @ left
        return Problem(target, self.seen(moment), metric)

    def seen(self, moment: Tensor) -> Tensor:
        """`B H Bᵀ`, the second moment of what enters the core."""
        right = self.blocks(moment.dtype)[1]
        return block_diagonal(block_diagonal(moment, right).T, right)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        left, right = self.blocks(exact)
        core = block_diagonal(self.core.dense(exact), right.mT)
        return block_diagonal(core.T, left).T.to(dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.blocks(x.dtype)
        return block_diagonal(self.core.forward(block_diagonal(x, right)), left)

    def to_tensors(self) -> dict[str, Tensor]:
        right = self.b.to_tensors()
        right = prefixed(right, "/" + self.shared) if self.shared else prefixed(right, "b")
        return {**prefixed(self.a.to_tensors(), "a"), **prefixed(self.core.to_tensors(), "core"), **right}

    def scheme(self) -> dict[str, Any]:
        scheme: dict[str, Any] = {"kind": self.kind, "block_sizes": self.block_sizes}
        if self.shared:
            scheme |= {"shared": self.shared, "sharers": self.sharers}
        return {**scheme, "a": self.a.scheme(), "core": self.core.scheme(), "b": self.b.scheme()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Callable[..., Operator]
    ) -> Armor:
        common = scheme.get("shared")
        right = below(tensors, "/" + common if common else "b")
        core = inner({**below(tensors, "core"), **shared(tensors)}, scheme["core"])
        a, b = inner(below(tensors, "a"), scheme["a"]), inner(right, scheme["b"])
        return cls(a, core, b, common, scheme.get("sharers", 1))
