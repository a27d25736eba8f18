"""8-bit numbers that meet inputs of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import cpu, dispatch, ops, reference
from .base import Operator, register
from .linear import RowsLinear


@dataclass(frozen=True)
class W8A8(Operator):
    """8-bit numbers with a scale a row, `W = codes * scales`, for products of 8-bit numbers: when they run, inputs are
    rounded alike, with a scale for each token, or one that is known before. Stored as compressed-tensors
    `int-quantized` or `float-quantized`.

    Attributes:
        codes: `[out_features, in_features]`, int8 or float8_e4m3fn.
        scales: `[out_features, 1]` in the model's dtype, any sign.
        input_scale: `[1]` in the model's dtype, of all tokens; None for one each.
    """

    kind: ClassVar[str] = "w8a8"
    multiplies: ClassVar[tuple[str, ...]] = ("scales",)
    codes: Tensor
    scales: Tensor
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> float:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.to_tensors().values())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (self.codes.to(exact) * self.scales.to(exact)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear_w8a8(x, self.codes, self.scales[:, 0], _wide(self.input_scale))

    @property
    def rounds_activations(self) -> bool:
        return True

    def beyond(self, x: Tensor) -> Tensor:
        codes, factors = reference.quantize_rows(x.reshape(-1, x.shape[-1]), self.codes.dtype, _wide(self.input_scale))
        rounded = (codes.to(x.dtype) * factors[:, None].to(x.dtype)).view(x.shape)
        return F.linear(rounded.sub_(x), self.dense(x.dtype))

    @property
    def description(self) -> str:
        name = "w8a8 int8" if self.codes.dtype == torch.int8 else "w8a8 fp8"
        return name if self.input_scale is None else f"{name} static"

    @property
    def scales_rows(self) -> bool:
        return True

    def rows_times(self, scale: Tensor) -> W8A8:
        return replace(self, scales=(self.scales.float() * scale[:, None]).to(self.scales.dtype))

    def rows(self, which: Tensor | slice) -> W8A8:
        return replace(self, codes=self.codes[which], scales=self.scales[which])

    def to_tensors(self) -> dict[str, Tensor]:
        stored = {"weight": self.codes, "weight_scale": self.scales}
        return stored if self.input_scale is None else {**stored, "input_scale": self.input_scale}

    def scheme(self) -> dict[str, Any]:
        told = {"kind": self.kind, "type": "int" if self.codes.dtype == torch.int8 else "float"}
        return told if self.input_scale is None else {**told, "inputs": "tensor"}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> W8A8:
        met = tensors["input_scale"] if scheme.get("inputs") == "tensor" else None
        if met is not None and met.numel() != 1:
            raise ValueError(f"input_scale is of {met.numel()} numbers, not of one")
        codes, scales = tensors["weight"], tensors["weight_scale"]
        if codes.dtype != {"int": torch.int8, "float": torch.float8_e4m3fn}[scheme["type"]]:
            raise ValueError(f"weight is of {codes.dtype}, which is not what 8-bit codes of type {scheme['type']} are")
        if scales.shape != (len(codes), 1) or not scales.dtype.is_floating_point:
            raise ValueError(f"weight_scale is not a float for each of {len(codes)} rows")
        return cls(codes, scales, met)


def _wide(scale: Tensor | None) -> Tensor | None:
    """A scale of inputs in float32, `[1]`."""
    return None if scale is None else scale.float().view(1)


class W8A8Linear(RowsLinear):
    """8-bit numbers that meet inputs of 8 bits.

    Attributes:
        codes: int8 or fp8 `[out_features, in_features]`; scales: float32 `[out_features]`; input_scale: float32 `[1]`
            or None.
    """

    codes: Tensor
    scales: Tensor
    input_scale: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        operator = W8A8.from_tensors(tensors, scheme)
        super().__init__(*operator.shape)
        codes, device = operator.codes.contiguous(), operator.codes.device
        self.dtype = dtype
        self.device_layout = dispatch.has_kernels(device, dtype) and dispatch.has_w8a8(
            codes.dtype, dtype, *operator.shape, dispatch.gpu_capability(device)
        )
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", operator.scales[:, 0].float(), persistent=False)
        self.register_buffer("input_scale", _wide(operator.input_scale), persistent=False)
        self._multiplies_bytes = codes.dtype == torch.int8 and dispatch.cpu_capability().int8

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._multiplies_bytes = self.codes.dtype == torch.int8 and dispatch.cpu_capability().int8  # of this machine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W8A8Linear:
        """Moves what is stored as bytes, so that a cast of the model to another dtype leaves codes and scales alone."""
        stored = {"codes": self.codes.dtype, "scales": self.scales.dtype}
        stored |= {} if self.input_scale is None else {"input_scale": self.input_scale.dtype}
        self._view_stored(dict.fromkeys(stored, torch.uint8))
        try:
            super()._apply(fn, recurse)
        finally:  # also where a device has no room for it
            self._view_stored(stored)
        return self

    def _view_stored(self, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, dtype in dtypes.items():
            setattr(self, name, getattr(self, name).view(dtype))

    def decode(self, rows: slice, dtype: torch.dtype, scratch: cpu.Scratch | None = None) -> Tensor:
        # Codes are exact in every dtype; scales, in that of the model.
        codes = cpu.decode_fp8(self.codes[rows], dtype, scratch) if self.codes.is_floating_point() else self.codes[rows]
        return codes.to(dtype) * self.scales[rows, None].to(dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        return self.decode(slice(None), dtype)

    def fused(self, x: Tensor, bias: Tensor | None = None, *residual: Tensor | None) -> Tensor:
        result: Tensor = ops.quantized_rows_linear(x, self.codes, self.scales, bias, self.input_scale)
        up, down = residual or (None, None)
        return result if up is None or down is None else result + F.linear(down, up)

    def path(self, tokens: int, dtype: torch.dtype) -> str:
        bytes_too = self._multiplies_bytes and self.codes.device.type == "cpu" and not self.device_layout
        return "oneDNN's products of bytes" if bytes_too else super().path(tokens, dtype)

    def tiled(self, x: Tensor) -> Tensor:
        if self._multiplies_bytes and x.device.type == "cpu":  # a loaded model may be moved
            return cpu.bytes_linear(x, self.codes, self.scales, self.input_scale)
        inputs, factors = reference.quantize_rows(x.reshape(-1, x.shape[-1]), self.codes.dtype, self.input_scale)
        return super().tiled(inputs.float().mul_(factors[:, None]).to(x.dtype).view(x.shape))


register(W8A8, W8A8Linear)
