"""ARMOR: a matrix as block-diagonal × sparse core × block-diagonal (arXiv 2510.05528)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.reference import block_diagonal
from .base import Composite, Operator, below, build, from_tensors, prefixed, register, shared
from .integers import IntQuantized
from .linear import Blocks, StoredLinear


@dataclass(frozen=True)
class Armor(Composite):
    """`W = A S B` with A and B block-diagonal.

    Attributes:
        a: an operator `[out_features, block]` whose rows are those of the blocks of A, one block below the other.
        core: S, an operator `[out_features, in_features]`.
        b: like a, `[in_features, block]`.
        shared: a name if B is stored once for several linears that read the same input.
        sharers: how many they are.
    """

    kind: ClassVar[str] = "armor"
    moves_inputs: ClassVar[bool] = True
    ends: ClassVar[tuple[str, ...]] = ("a",)
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

    @property
    def lent(self) -> tuple[str, ...]:
        return ("b",) if self.sharers > 1 else ()

    def with_inner(self, inner: Operator) -> Armor:
        return Armor(self.a, inner, self.b, self.shared, self.sharers)

    def blocks(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A and B as `[blocks, block, block]`."""
        left, right = self.a.dense(dtype), self.b.dense(dtype)
        return left.view(-1, left.shape[1], left.shape[1]), right.view(-1, right.shape[1], right.shape[1])

    def aim(self, target: Tensor) -> Tensor:
        """`A⁻¹ T B⁻¹`, in float64; A and B have to be invertible."""
        left, right = self.blocks(torch.float64)
        target = target.double()
        target = torch.linalg.solve(left, target.view(*left.shape[:2], -1)).reshape(target.shape)
        return torch.linalg.solve(right.mT, target.T.reshape(*right.shape[:2], -1)).reshape(target.T.shape).T

    def seen(self, moment: Tensor) -> Tensor:
        """`B H Bᵀ`, for the core's inputs are `B x`."""
        right = self.blocks(moment.dtype)[1]
        return block_diagonal(block_diagonal(moment, right).T, right)

    def valued(self, metric: Tensor | None) -> Tensor:
        """`Aᵀ M A`, in float64."""
        left = self.blocks(torch.float64)[0]
        return left.mT @ left if metric is None else left.mT @ metric.double() @ left

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        left, right = self.blocks(exact)
        core = block_diagonal(self.core.dense(exact), right.mT)
        return block_diagonal(core.T, left).T.to(dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.blocks(x.dtype)
        return block_diagonal(self.core.forward(block_diagonal(x, right)), left)

    @property
    def description(self) -> str:
        sizes = sorted(set(self.block_sizes))
        wrappers = "" if self.a.kind == "dense" else f" {self.a.description.split()[0]}"
        return f"armor b{'/'.join(map(str, sizes))}{wrappers} {self.core.description}"

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
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Armor:
        common = scheme.get("shared")
        right = below(tensors, "/" + common if common else "b")
        core = from_tensors({**below(tensors, "core"), **shared(tensors)}, scheme["core"])
        a, b = from_tensors(below(tensors, "a"), scheme["a"]), from_tensors(right, scheme["b"])
        return cls(a, core, b, common, scheme.get("sharers", 1))


class ArmorLinear(StoredLinear):
    """Block-diagonal × core × block-diagonal.

    Attributes:
        a, b: hold the blocks, one below the other, where no kernel runs all at once.
    """

    core: Any

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        common = scheme.get("shared")
        parts = below(tensors, "a"), below(tensors, "/" + common if common else "b")
        core = build({**below(tensors, "core"), **shared(tensors)}, scheme["core"], dtype)
        super().__init__(core.out_features, core.in_features)
        self.core = core
        self._blocks: tuple[Blocks, Blocks] | None = None
        operators = [from_tensors(part, scheme[key]) for part, key in zip(parts, "ab", strict=True)]
        if getattr(core, "device_layout", False) and all(one.shape[1] in (16, 32, 64, 128) for one in operators):
            left, right = (_blocks(one, dtype) for one in operators)
            self._blocks = right, left
            return
        self.a, self.b = (build(part, scheme[key], dtype) for part, key in zip(parts, "ab", strict=True))

    def product(self, x: Tensor) -> Tensor:
        if self._blocks is not None:
            return self.affine(x.to(self.core.dtype), None).to(x.dtype)
        left, right = (part.whole(x.dtype).view(-1, part.in_features, part.in_features) for part in (self.a, self.b))
        return block_diagonal(self.core.product(block_diagonal(x, right)), left)

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        if self._blocks is None or x.dtype != self.core.dtype:
            return super().affine(x, bias, up, down)
        result: Tensor = self.core.between(x, *self._blocks, bias, up, down)
        return result


def _blocks(operator: Operator, dtype: torch.dtype) -> Blocks:
    """A or B as the kernels take it: bytes with a scale a row as they are, else floats."""
    bytes_by_row = isinstance(operator, IntQuantized) and operator.bits == 8 and operator.scales.shape[1] == 1
    if isinstance(operator, IntQuantized) and bytes_by_row and operator.zeros is None:
        return operator.codes, operator.scales[:, 0].to(dtype).contiguous()
    return operator.dense(dtype).contiguous(), None


register(Armor, ArmorLinear)
