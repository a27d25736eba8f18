"""Operators that hold a matrix of numbers: plain, integers with scales, or 8-bit numbers that meet inputs of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import layouts, reference


@dataclass(frozen=True)
class Dense:
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

    def to_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Any = None) -> Dense:
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
    def nbytes(self) -> float:
        (rows, columns), groups = self.shape, self.scales.shape[1]
        words = rows * layouts.packed_words(columns, self.bits)
        if self.zeros is not None:
            words += groups * layouts.packed_words(rows, self.bits)
        return 4 * words + self.scales.numel() * self.scales.element_size() + 2 * 8

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
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Any = None) -> IntQuantized:
        rows, columns = (int(n) for n in tensors["weight_shape"])
        bits = scheme["bits"]
        zeros = None
        if not scheme["symmetric"]:
            zeros = layouts.unpack_codes(tensors["weight_zero_point"].T.contiguous(), bits, rows).T.contiguous()
        codes = layouts.unpack_codes(tensors["weight_packed"], bits, columns)
        return cls(codes, tensors["weight_scale"], zeros, bits, scheme["group_size"])


@dataclass(frozen=True)
class W8A8:
    """8-bit numbers with a scale a row, `W = codes * scales`, for products of 8-bit numbers: when they run, inputs are
    rounded alike, with a scale for each token. Stored as compressed-tensors `int-quantized` or `float-quantized`.

    Attributes:
        codes: `[out_features, in_features]`, int8 or float8_e4m3fn.
        scales: `[out_features, 1]` in the model's dtype, any sign.
    """

    kind: ClassVar[str] = "w8a8"
    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> float:
        return self.codes.numel() + self.scales.numel() * self.scales.element_size()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(exact) * self.scales.to(exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear_w8a8(x, self.codes, self.scales[:, 0])

    def to_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.codes, "weight_scale": self.scales}

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "type": "int" if self.codes.dtype == torch.int8 else "float"}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], inner: Any = None) -> W8A8:
        return cls(tensors["weight"], tensors["weight_scale"])
