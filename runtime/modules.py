"""Modules that execute linears in their stored form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cpu, dispatch
from ..kernels.reference import linear_int
from .operators import IntQuantized


class IntLinear(nn.Module):
    """A group-quantized linear layer that keeps its weight packed.

    Attributes:
        packed, scales, zeros: as stored (`operators.IntQuantized`), zeros unpacked to int8.
        bias: `[out_features]` or None.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(
        self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        operator = IntQuantized.from_tensors(tensors, scheme)
        self.out_features, self.in_features = operator.shape
        self.bits, self.group_size, self.span = operator.bits, operator.group_size, operator.span
        self.register_buffer("packed", tensors["weight_packed"], persistent=False)
        self.register_buffer("scales", operator.scales, persistent=False)
        self.register_buffer("zeros", operator.zeros, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(dtype), persistent=False)
        self._int4: tuple[Tensor, Tensor] | None = None
        native = dispatch.has_int4_kernel(
            self.bits, self.out_features, self.span, self.in_features, operator.zeros is None
        )
        if native and dtype == torch.bfloat16 and self.packed.device.type == "cpu":
            self._int4 = cpu.pack_int4(operator.codes, operator.scales)

    @property
    def operator(self) -> IntQuantized:
        """The stored form, unpacked."""
        tensors = {"weight_packed": self.packed, "weight_scale": self.scales}
        shape = torch.tensor([self.out_features, self.in_features])
        scheme = {"bits": self.bits, "group_size": self.group_size, "symmetric": True}
        symmetric = IntQuantized.from_tensors({**tensors, "weight_shape": shape}, scheme)
        return IntQuantized(symmetric.codes, self.scales, self.zeros, self.bits, self.group_size)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded at each call."""
        return self.operator.dense(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` → `[..., out_features]`."""
        tokens = x.numel() // x.shape[-1]
        if x.device.type != "cpu":
            operator = self.operator
            result = linear_int(x, operator.codes, self.scales, self.zeros, self.span)
        elif self._int4 is not None and dispatch.int4_path(tokens, x.dtype, dispatch.cpu_capability()) == "int4pack":
            result = cpu.linear_int4(x, *self._int4, self.span)
        else:
            result = cpu.linear_packed(x, self.packed, self.scales, self.zeros, self.bits, self.in_features, self.span)
        return result if self.bias is None else result + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int{self.bits}, group_size={self.group_size}"
