"""Numbers of few bits whose blocks share a scale: FP8 in squares, NVFP4, and the formats that OCP calls MX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import cpu, dispatch, layouts, reference, swizzles
from ...kernels.numbers import ROUNDINGS, Floats, Rounding
from .base import Operator, register, rounded_inputs
from .linear import GroupLinear


@dataclass(frozen=True)
class BlockScaled(Operator):
    """`W = numbers * scales / global_scale`, a scale for each block, stored as compressed-tensors stores it. With
    `inputs`, for products of such numbers: when they run, inputs are rounded too.

    Attributes:
        codes: the numbers, a byte each (`Floats.as_bytes`), `[out_features, in_features]`.
        scales: `[blocks of rows, blocks of columns]`: in the model's dtype, as float8_e4m3fn, or, powers
            of two, as their exponents, uint8.
        global_scale: float32 `[1]`, a power of two, that scales of float8_e4m3fn are over; else None.
        name: of what the weight is rounded to (`kernels.numbers.ROUNDINGS`).
        inputs: of what inputs are rounded to; None: they are not.
        input_scale: float32 `[1]`, for inputs what `global_scale` is for the weight.
    """

    kind: ClassVar[str] = "block_scaled"
    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    name: str
    inputs: str | None = None
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def rounding(self) -> Rounding:
        return ROUNDINGS[self.name]

    @property
    def nbytes(self) -> float:
        (rows, columns), bits = self.shape, self.rounding.bits
        more = sum(4 for scale in (self.global_scale, self.input_scale) if scale is not None)
        return rows * -(-columns * bits // 8) + self.scales.numel() * self.scales.element_size() + more

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        values = self.rounding.numbers.of_bytes(self.codes, exact)
        return reference.scaled_blocks(values, self.scales, self.global_scale, self.rounding).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded_inputs(x, self.inputs, self.input_scale), self.dense(x.dtype))

    @property
    def rounds_activations(self) -> bool:
        return self.inputs is not None

    def beyond(self, x: Tensor) -> Tensor:
        return F.linear(rounded_inputs(x, self.inputs, self.input_scale) - x, self.dense(x.dtype))

    @property
    def description(self) -> str:
        return self.name if self.inputs is None else f"{self.name}, inputs {self.inputs}"

    def rows(self, which: Tensor | slice) -> BlockScaled:
        shared = self.rounding.rows
        if shared == 1:
            return replace(self, codes=self.codes[which], scales=self.scales[which])
        if not isinstance(which, slice) or (which.start or 0) % shared or which.step not in (None, 1):
            raise NotImplementedError(f"{self.name}: rows that share scales are taken together")
        stop = self.shape[0] if which.stop is None else min(which.stop, self.shape[0])
        blocks = slice((which.start or 0) // shared, -(-stop // shared))
        return replace(self, codes=self.codes[which], scales=self.scales[blocks])

    def to_tensors(self) -> dict[str, Tensor]:
        if self.rounding.bits == 4:
            tensors = {"weight_packed": layouts.pack_indices(self.codes)}
        else:
            integers = self.codes.dtype == torch.int8
            tensors = {"weight": self.codes if integers else self.codes.view(torch.float8_e4m3fn)}
        tensors["weight_scale"] = self.scales
        if self.global_scale is not None:
            tensors["weight_global_scale"] = self.global_scale
        if self.input_scale is not None:
            tensors["input_global_scale"] = self.input_scale
        return tensors

    def scheme(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "inputs": self.inputs}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> BlockScaled:
        rounding = ROUNDINGS[scheme["name"]]
        if rounding.bits == 4:
            packed = tensors["weight_packed"]
            codes = layouts.unpack_indices(packed, 2 * packed.shape[1])
        else:
            codes = tensors["weight"]
            codes = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
        whole = tensors["weight_global_scale"] if rounding.scales == "e4m3" else None
        met = tensors["input_global_scale"] if scheme["inputs"] == "nvfp4" else None
        return cls(codes, tensors["weight_scale"], whole, scheme["name"], scheme["inputs"], met)


class BlockScaledLinear(GroupLinear):
    """Blocks that share a scale, kept as on disk, or in the layout of a GPU's kernel.

    Attributes:
        packed, scales, factor, input_factor: as stored (`BlockScaled`), but as bytes, so that a cast of the model to
            another dtype leaves them alone.
    """

    packed: Tensor
    scales: Tensor
    factor: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        operator = BlockScaled.from_tensors(tensors, scheme)
        super().__init__(*operator.shape)
        self.rounding, self.dtype, self.inputs = operator.rounding, dtype, operator.inputs
        if operator.input_scale is not None:
            self.register_buffer("input_factor", _bytes(operator.input_scale), persistent=False)
        if dispatch.has_kernels(operator.codes.device, dtype) and (words := _swizzled(operator, dtype)) is not None:
            self.keep_words(words)
            return
        self.scale_dtype, whole = operator.scales.dtype, operator.global_scale
        self.register_buffer("packed", _bytes(tensors.get("weight_packed", tensors.get("weight"))), persistent=False)
        self.register_buffer("scales", _bytes(operator.scales), persistent=False)
        self.register_buffer("factor", None if whole is None else _bytes(whole), persistent=False)

    def decode(self, rows: slice, dtype: torch.dtype, scratch: cpu.Scratch | None = None) -> Tensor:
        numbers, height = self.rounding.numbers, self.rounding.rows
        start, stop, _ = rows.indices(self.out_features)
        packed = self.packed[start:stop]
        if self.rounding.bits == 4:
            packed = layouts.unpack_indices(packed, 2 * packed.shape[1])
        values = numbers.of_bytes(packed, torch.float32)
        first = start // height
        scales = self.scales.view(self.scale_dtype)[first : -(-stop // height)]
        lead = start - first * height
        whole = None if self.factor is None else self.factor.view(torch.float32)
        return reference.scaled_blocks(values, scales, whole, self.rounding, lead).to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.rounding}"


def _swizzled(operator: BlockScaled, dtype: torch.dtype) -> swizzles.GroupWords | None:
    """In the layout of the kernel, where that takes such groups and has room for such scales."""
    rounding, (rows, columns) = operator.rounding, operator.shape
    span, bits = rounding.span(columns), rounding.bits
    if dtype != torch.bfloat16 or not dispatch.has_group_linear(span, columns):
        return None
    groups = torch.ones(rows, operator.scales.shape[1], device=operator.codes.device)
    per_group = Rounding(rounding.numbers, 1, rows=rounding.rows, scales=rounding.scales)
    exact = reference.scaled_blocks(groups, operator.scales, operator.global_scale, per_group)
    if isinstance(rounding.numbers, Floats):
        return swizzles.swizzle_floats(operator.codes, exact, bits, span)
    return swizzles.swizzle_int(operator.codes, exact, None, bits, span, dtype)


def _bytes(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous().view(torch.int8 if tensor.dtype == torch.int8 else torch.uint8)


register(BlockScaled, BlockScaledLinear)
