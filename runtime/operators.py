"""A linear map in the form it is stored in.

Every operator maps `[..., in_features]` to `[..., out_features]` and knows its stored tensors; `from_tensors` undoes
`to_tensors` exactly. On the `meta` device an operator has shapes and bytes but no values, which is what plans use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import layouts, reference


@runtime_checkable
class Operator(Protocol):
    """What passes rewrite, the writer stores and the runtime runs."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        ...

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out_features, in_features]` this operator stands for."""
        ...

    def forward(self, x: Tensor) -> Tensor: ...

    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by suffix (`weight`, `weight_packed`, ...)."""
        ...

    def scheme(self) -> dict[str, Any]:
        """What a reader must know beside the tensors; equal schemes are written once."""
        ...


def stored_bytes(operator: Operator) -> int:
    """Bytes of the stored tensors, scales and all."""
    return sum(tensor.numel() * tensor.element_size() for tensor in operator.to_tensors().values())


@dataclass(frozen=True)
class Dense:
    """A plain weight `[out_features, in_features]`."""

    kind: ClassVar[str] = "dense"
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def to_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Dense:
        return cls(tensors["weight"])


@dataclass(frozen=True)
class IntQuantized:
    """Group-wise integers: `W = (codes - zeros) * scales`, stored as compressed-tensors `pack-quantized` stores them.

    Attributes:
        codes: int8 `[out_features, in_features]`, in `[-2**(bits-1), 2**(bits-1) - 1]`.
        scales: `[out_features, groups]` in the model's dtype, any sign; `groups = ceil(in_features / span)`.
        zeros: int8 `[out_features, groups]` in the range of the codes, or None when symmetric.
        bits: of a code on disk.
        group_size: columns that share a scale, the last group may be ragged; -1 for one scale a row.
    """

    kind: ClassVar[str] = "int"
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def span(self) -> int:
        """Columns that really share a scale."""
        return self.group_size if self.group_size > 0 else self.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return reference.dequantize_int(self.codes, self.scales, self.zeros, self.span, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear_int(x, self.codes, self.scales, self.zeros, self.span)

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {
            "weight_packed": layouts.pack_codes(self.codes, self.bits),
            "weight_scale": self.scales,
            "weight_shape": torch.tensor(self.shape, dtype=torch.int64, device="cpu"),
        }
        if self.zeros is not None:  # packed along the rows, unlike the weight
            tensors["weight_zero_point"] = layouts.pack_codes(self.zeros.T, self.bits).T.contiguous()
        return tensors

    def scheme(self) -> dict[str, Any]:
        symmetric = self.zeros is None
        return {"kind": self.kind, "bits": self.bits, "group_size": self.group_size, "symmetric": symmetric}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> IntQuantized:
        rows, columns = (int(n) for n in tensors["weight_shape"])
        bits = scheme["bits"]
        zeros = None
        if not scheme["symmetric"]:
            zeros = layouts.unpack_codes(tensors["weight_zero_point"].T.contiguous(), bits, rows).T.contiguous()
        codes = layouts.unpack_codes(tensors["weight_packed"], bits, columns)
        return cls(codes, tensors["weight_scale"], zeros, bits, scheme["group_size"])


KINDS: dict[str, type[Dense] | type[IntQuantized]] = {"dense": Dense, "int": IntQuantized}


def from_tensors(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> Operator:
    """Rebuild any operator from its stored tensors and its scheme."""
    return KINDS[scheme["kind"]].from_tensors(tensors, scheme)
