"""Integers with a scale for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import cpu, dispatch, layouts, reference, swizzles
from .base import Operator, register, rounded_inputs
from .linear import GroupLinear


@dataclass(frozen=True)
class IntQuantized(Operator):
    """Group-wise integers: `W = (codes - zeros) * scales`, stored as compressed-tensors `pack-quantized` stores them.

    Attributes:
        codes: int8 `[out_features, in_features]`, in `[-2**(bits-1), 2**(bits-1) - 1]`.
        scales: `[out_features, groups]` in the model's dtype, any sign; `groups = ceil(in_features / span)`.
        zeros: int8 `[out_features, groups]` in the range of the codes, or None when symmetric.
        bits: of a code on disk.
        group_size: columns that share a scale, the last group may be ragged; -1 for one scale a row.
        inputs: what inputs are rounded to when they run, by its name in `kernels.numbers.ROUNDINGS`; None: they stay.
    """

    kind: ClassVar[str] = "int"
    multiplies: ClassVar[tuple[str, ...]] = ("scales",)
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    inputs: str | None = None

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
        x = rounded_inputs(x, self.inputs)
        return reference.linear_int(x, self.codes, self.scales, self.zeros, self.span)

    @property
    def rounds_activations(self) -> bool:
        return self.inputs is not None

    def beyond(self, x: Tensor) -> Tensor:
        return F.linear(rounded_inputs(x, self.inputs) - x, self.dense(x.dtype))

    @property
    def description(self) -> str:
        return self.described(self.group_size)

    def described(self, group_size: int) -> str:
        """The same where so many columns of the whole weight share a scale; -1 for all."""
        group = "per row" if group_size < 0 else f"g{group_size}"
        more = ("" if self.zeros is None else " asymmetric") + (f", inputs {self.inputs}" if self.inputs else "")
        return f"int{self.bits} {group}{more}"

    @property
    def scales_rows(self) -> bool:
        return True

    def rows_times(self, scale: Tensor) -> IntQuantized:
        return replace(self, scales=(self.scales.float() * scale[:, None]).to(self.scales.dtype))

    def rows(self, which: Tensor | slice) -> IntQuantized:
        zeros = None if self.zeros is None else self.zeros[which]
        return replace(self, codes=self.codes[which], scales=self.scales[which], zeros=zeros)

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
        found = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.zeros is None}
        return {"kind": self.kind, **found, **({} if self.inputs is None else {"inputs": self.inputs})}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> IntQuantized:
        rows, columns = (int(n) for n in tensors["weight_shape"])
        bits = scheme["bits"]
        if not tensors["weight_scale"].dtype.is_floating_point:
            raise ValueError("weight_scale is of integers")
        zeros = None
        if not scheme["symmetric"]:
            zeros = layouts.unpack_codes(tensors["weight_zero_point"].T.contiguous(), bits, rows).T.contiguous()
        codes = layouts.unpack_codes(tensors["weight_packed"], bits, columns)
        return cls(codes, tensors["weight_scale"], zeros, bits, scheme["group_size"], scheme.get("inputs"))


class IntLinear(GroupLinear):
    """Group-quantized integers, kept packed.

    Attributes:
        packed, scales, zeros: as stored (`IntQuantized`), zeros unpacked to int8; none of them in the kernel's layout.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        operator = IntQuantized.from_tensors(tensors, scheme)
        super().__init__(*operator.shape)
        self.bits, self.group_size, self.span = operator.bits, operator.group_size, operator.span
        self.dtype, self.inputs, device = dtype, operator.inputs, operator.codes.device
        if dispatch.has_kernels(device, dtype) and dispatch.has_group_linear(self.span, self.in_features):
            self.keep_words(
                swizzles.swizzle_int(operator.codes, operator.scales, operator.zeros, self.bits, self.span, dtype)
            )
            return
        self.register_buffer("packed", tensors["weight_packed"], persistent=False)
        self.register_buffer("scales", operator.scales, persistent=False)
        self.register_buffer("zeros", operator.zeros, persistent=False)

    def decode(self, rows: slice, dtype: torch.dtype, scratch: cpu.Scratch | None = None) -> Tensor:
        zeros = None if self.zeros is None else self.zeros[rows]
        packed, scales = self.packed[rows], self.scales[rows]
        return cpu.decode_packed(packed, scales, zeros, self.bits, self.in_features, self.span, dtype, scratch)

    def path(self, tokens: int, dtype: torch.dtype) -> str:
        packs = not self.device_layout and self._packs(dtype, self.packed.device)
        if packs and dispatch.int4_path(tokens, dtype, dispatch.cpu_capability()) == "int4pack":
            return "torch's int4 kernel"
        return super().path(tokens, dtype)

    def _packs(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether torch's kernel for 4 bits may take products."""
        return self.bits <= 4 and dtype == torch.bfloat16 and device.type == "cpu"

    def tiled(self, x: Tensor) -> Tensor:
        if not self._packs(x.dtype, x.device):
            return super().tiled(x)
        return cpu.packed_linear(self.entering(x), self.packed, self.scales, self.zeros, self.bits, self.span)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int{self.bits}, group_size={self.group_size}"


class IntRows(nn.Module):
    """Rows of group-quantized integers, kept packed as on disk (zero points unpacked)."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> None:
        super().__init__()
        rows, self.columns = (int(n) for n in tensors["weight_shape"])
        self.bits, size = scheme["bits"], scheme["group_size"]
        self.span = size if size > 0 else self.columns
        zeros = None
        if not scheme["symmetric"]:
            zeros = layouts.unpack_codes(tensors["weight_zero_point"].T.contiguous(), self.bits, rows).T.contiguous()
        self.register_buffer("packed", tensors["weight_packed"], persistent=False)
        self.register_buffer("scales", tensors["weight_scale"], persistent=False)
        self.register_buffer("zeros", zeros, persistent=False)

    def forward(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `[rows, in_features]` of these numbers `[rows]`."""
        codes = layouts.unpack_codes(self.packed[numbers], self.bits, self.columns)
        zeros = None if self.zeros is None else self.zeros[numbers]
        return reference.dequantize_int(codes, self.scales[numbers], zeros, self.span, dtype)


register(IntQuantized, IntLinear, IntRows)
