"""A few columns kept as floats beside an operator of all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Composite, Operator, Problem, below, build, from_tensors, prefixed, register, shared
from .dense import Dense
from .linear import StoredLinear


@dataclass(frozen=True)
class WithColumns(Composite):
    """`W x = base x' + columns x[index]`, where x' is x with zeros for the inputs that `index` names.

    So inputs that are far larger than others (LLM.int8(), arXiv:2208.07339) neither make the steps of rounded inputs
    coarse nor meet rounded weights. `base` has all columns, that its groups stay whole; what it holds in those of
    `index` does not matter.

    Attributes:
        columns: floats `[out_features, k]`.
        index: int32 `[k]`, rising.
    """

    kind: ClassVar[str] = "columns"
    ends: ClassVar[tuple[str, ...]] = ("base", "columns")
    base: Operator
    columns: Dense
    index: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def nbytes(self) -> float:
        return self.base.nbytes + self.columns.nbytes + self.index.numel() * self.index.element_size()

    @property
    def inner(self) -> Operator:
        return self.base

    def with_inner(self, inner: Operator) -> WithColumns:
        return WithColumns(inner, self.columns, self.index)

    def aim(self, target: Tensor) -> Tensor:
        return self.entering(target)

    def seen(self, moment: Tensor) -> Tensor:
        return self.entering(self.entering(moment).T)

    def entering(self, x: Tensor) -> Tensor:
        """x', of inputs `[..., in_features]`."""
        return x.index_fill(-1, self.index.long(), 0)

    def refitted(self, problem: Problem) -> WithColumns:
        """The same base, with the columns that then solve a problem best: each row's are a least-squares fit."""
        where, moment, target = self.index.long(), problem.moment, problem.target
        missing = self.entering(target - self.base.dense(target.dtype))
        own = moment[where][:, where].double()
        change = torch.linalg.solve(own, (missing @ moment[:, where]).double(), left=False)
        columns = (target[:, where] + change).to(self.columns.weight.dtype)
        return WithColumns(self.base, Dense(columns), self.index)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.base.dense(dtype).index_copy(1, self.index.long(), self.columns.dense(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base.forward(self.entering(x)) + self.columns.forward(x[..., self.index.long()])

    def beyond(self, x: Tensor) -> Tensor:
        return self.base.beyond(self.entering(x))

    @property
    def description(self) -> str:
        return f"{self.base.description} + {len(self.index)} columns"

    def to_tensors(self) -> dict[str, Tensor]:
        own = {**prefixed(self.columns.to_tensors(), "columns"), "index": self.index}
        return {**prefixed(self.base.to_tensors(), "base"), **own}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "base": self.base.scheme()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> WithColumns:
        base = from_tensors({**below(tensors, "base"), **shared(tensors)}, scheme["base"])
        _check(tensors, *base.shape)
        return cls(base, Dense(tensors["columns.weight"]), tensors["index"])


def _check(tensors: Mapping[str, Tensor], rows: int, count: int) -> None:
    """Raise a ValueError where stored columns are not some of so many."""
    index, shape = tensors["index"], tuple(tensors["columns.weight"].shape)
    if index.is_floating_point() or index.dim() != 1 or shape != (rows, len(index)):
        raise ValueError(f"columns are {list(shape)} for an index of {list(index.shape)} and {rows} rows")
    places = torch.arange(0) if index.device.type == "meta" else index.long()
    if len(places) and (int(places[0]) < 0 or int(places[-1]) >= count or bool((places.diff() <= 0).any())):
        raise ValueError(f"index does not name some of {count} columns in rising order")


class ColumnsLinear(StoredLinear):
    """A linear in stored form, and beside it a few columns as floats."""

    base: StoredLinear
    matrix: Tensor
    index: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        base = build({**below(tensors, "base"), **shared(tensors)}, scheme["base"], dtype)
        super().__init__(base.out_features, base.in_features)
        _check(tensors, base.out_features, base.in_features)
        self.base = base
        self.register_buffer("matrix", tensors["columns.weight"].to(dtype), persistent=False)
        self.register_buffer("index", tensors["index"].long(), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        matrix, kept = self.matrix.to(x.dtype), x[..., self.index]
        if up is not None and down is not None:
            matrix, kept = torch.cat([matrix, up.to(x.dtype)], 1), torch.cat([kept, down.to(x.dtype)], -1)
        return self.base.affine(x.index_fill(-1, self.index, 0), bias, matrix, kept)


register(WithColumns, ColumnsLinear)
