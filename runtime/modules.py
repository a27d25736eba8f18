"""Modules that execute an operator in its stored form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import cpu, dispatch
from .operators import IntQuantized, Operator


class CompressedLinear(nn.Module):
    """A linear layer around an operator.

    Attributes:
        operator: what is stored; `weight` decodes it.
    """

    def __init__(self, operator: Operator, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.operator = operator
        self.out_features, self.in_features = operator.shape
        self.dtype = dtype
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self._int4: tuple[Tensor, Tensor] | None = None
        if isinstance(operator, IntQuantized) and operator.codes.device.type == "cpu" and dtype == torch.bfloat16:
            rows, columns = operator.shape
            symmetric = operator.zeros is None
            if dispatch.has_int4_kernel(operator.bits, rows, operator.span, columns, symmetric):
                self._int4 = cpu.pack_int4(operator.codes, operator.scales)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded at each call."""
        return self.operator.dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self._int4 is not None:
            tokens = x.numel() // x.shape[-1]
            if dispatch.int4_path(tokens, x.dtype, dispatch.cpu_capability()) == "int4pack":
                assert isinstance(self.operator, IntQuantized)
                result = cpu.linear_int4(x, *self._int4, self.operator.span)
                return result if self.bias is None else result + self.bias
        return F.linear(x, self.operator.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.operator.scheme()}"
