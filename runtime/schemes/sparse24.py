"""2:4 sparsity: of four neighbours in a row two are stored, and where they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import cpu, dispatch, layouts, ops, swizzles
from .base import Operator, below, build, from_tensors, prefixed, register
from .integers import IntQuantized
from .linear import Blocks, RowsLinear


@dataclass(frozen=True)
class Sparse24(Operator):
    """Two of every four columns.

    Attributes:
        values: an operator `[out_features, in_features / 2]`: the kept ones from left to right. Its groups of columns
            that share a scale are half as wide as those of the columns they came from.
        indices: uint8 `[out_features, in_features / 4]`, `first | second << 2` with first < second in 0..3.
    """

    kind: ClassVar[str] = "sparse24"
    ends: ClassVar[tuple[str, ...]] = ("values",)
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
        return layouts.kept24(self.indices)

    @property
    def numbers(self) -> Operator:
        return self.values

    def coded(self, stored: Operator) -> Sparse24:
        """The codes that are kept, in groups half as wide."""
        if not isinstance(stored, IntQuantized) or stored.inputs is not None:
            raise NotImplementedError("a 2:4 pattern holds integers, whose inputs are not rounded")
        kept, indices = layouts.compress24(stored.codes, self.keep if not stored.codes.is_meta else stored.codes)
        size = stored.group_size if stored.group_size < 0 else stored.group_size // 2
        return Sparse24(replace(stored, codes=kept, group_size=size), indices)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return layouts.expand24(self.values.dense(dtype), self.indices)

    def rows(self, which: Tensor | slice) -> Sparse24:
        return Sparse24(self.values.rows(which), self.indices[which])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype))

    @property
    def description(self) -> str:
        values = self.values
        if not isinstance(values, IntQuantized):
            return "2:4"
        return f"2:4 {values.described(values.group_size if values.group_size < 0 else 2 * values.group_size)}"

    def to_tensors(self) -> dict[str, Tensor]:
        return {**prefixed(self.values.to_tensors(), "values"), "indices": layouts.pack_indices(self.indices)}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "values": self.values.scheme()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Sparse24:
        values = from_tensors(below(tensors, "values"), scheme["values"])
        return cls(values, layouts.unpack_indices(tensors["indices"], values.shape[1] // 2))


class Sparse24Linear(RowsLinear):
    """Two of every four columns.

    Attributes:
        values: holds the kept entries `[out_features, in_features / 2]`; indices: as stored, two groups a byte; or,
            for GPUs,
        entries, kept, pairs: in the layout of the kernels (`swizzles.SparseWords`).
    """

    values: RowsLinear
    indices: Tensor
    entries: Tensor
    kept: Tensor
    pairs: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        operator = Sparse24.from_tensors(tensors, scheme)
        super().__init__(*operator.shape)
        self.dtype, values = dtype, operator.values
        span = values.span if isinstance(values, IntQuantized) else values.shape[1]
        if dispatch.has_kernels(tensors["indices"].device, dtype) and dispatch.has_sparse_linear(span, values.shape[1]):
            self._swizzle(values, operator.indices)
            return
        inner = build(below(tensors, "values"), scheme["values"], dtype)
        assert isinstance(inner, RowsLinear)
        self.values = inner
        self.register_buffer("indices", tensors["indices"], persistent=False)

    def _swizzle(self, values: Operator, indices: Tensor) -> None:
        if isinstance(values, IntQuantized):
            words = swizzles.swizzle_sparse24(
                values.codes, indices, values.scales, values.zeros, values.bits, values.span, self.dtype
            )
        else:
            words = swizzles.swizzle_sparse24(values.dense(self.dtype), indices, None, None, 16, 0, self.dtype)
        self.layout = words.bits, words.group_size, words.width
        self._keep(entries=words.values, kept=words.kept, pairs=words.pairs)

    def between(self, x: Tensor, b: Blocks, a: Blocks, *ends: Tensor | None) -> Tensor:
        """`A W B x` and what follows: blocks as `ops` takes them, with their scales."""
        result: Tensor = ops.sparse_linear(
            x, self.entries, self.kept, self.pairs, self.out_features, *self.layout, *b, *a, *ends
        )
        return result

    def fused(self, x: Tensor, *ends: Tensor | None) -> Tensor:
        return self.between(x, (None, None), (None, None), *ends)

    def decode(self, rows: slice, dtype: torch.dtype, scratch: cpu.Scratch | None = None) -> Tensor:
        indices = layouts.unpack_indices(self.indices[rows], self.in_features // 4)
        values = self.values
        kept = values.whole(dtype)[rows] if values.device_layout else values.decode(rows, dtype, scratch)
        return layouts.expand24(kept, indices)


register(Sparse24, Sparse24Linear)
