"""Modules that execute linears in their stored form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import cpu, dispatch, layouts, ops
from ..kernels.reference import block_diagonal, grouped_product, quantize_rows
from .operators import W8A8, IntQuantized, Operator, Sparse24, from_tensors
from .operators.base import below, shared

Blocks = tuple[Tensor | None, Tensor | None]  # diagonal blocks one below the other, and the scales of their rows

_ALL = slice(None)


class StoredLinear(nn.Module):
    """A linear layer that keeps its weight as stored.

    Attributes:
        bias: `[out_features]` or None.
    """

    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", None, persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """`[..., in_features]` → `[..., out_features]`, without the bias."""
        raise NotImplementedError

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight `[out_features, in_features]`."""
        return self.product(torch.eye(self.in_features, dtype=dtype, device=next(self.buffers()).device)).T

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        """`W x + bias + up down`, for `down` `[..., rank]` that a residual's lower factor made of x."""
        result = self.product(x)
        if up is not None and down is not None:
            result = result + F.linear(down, up)
        return result if bias is None else result + bias

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class RowsLinear(StoredLinear):
    """One whose rows can be decoded on their own, so that products are made a tile of rows at a time; or, on a GPU, one
    that a kernel runs as it is.

    Attributes:
        device_layout: which of the two; then activations are taken in `dtype`.
    """

    device_layout = False
    dtype: torch.dtype

    def decode(self, rows: slice, dtype: torch.dtype, room: cpu.Room | None = None) -> Tensor:
        """Some rows of the weight, without a device layout; they may lie in `room`."""
        raise NotImplementedError

    def fused(self, x: Tensor, *ends: Tensor | None) -> Tensor:
        """A kernel's product and what follows it: bias, up and down, as `affine` takes them."""
        raise NotImplementedError

    def tiled(self, x: Tensor) -> Tensor:
        """The product a tile of rows at a time."""
        return cpu.linear_tiles(x, lambda rows, room: self.decode(rows, x.dtype, room), self.out_features)

    def whole(self, dtype: torch.dtype) -> Tensor:
        return super().whole(dtype) if self.device_layout else self.decode(_ALL, dtype)

    def product(self, x: Tensor) -> Tensor:
        return self.fused(x.to(self.dtype)).to(x.dtype) if self.device_layout else self.tiled(x)

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        if self.device_layout and x.dtype == self.dtype:
            return self.fused(x, bias, up, down)
        return super().affine(x, bias, up, down)

    def _keep(self, **tensors: Tensor | None) -> None:
        """Tensors of the kernels' layout, in place of those on disk."""
        self.device_layout = True
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class DenseLinear(RowsLinear):
    """A plain matrix."""

    matrix: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        rows, columns = tensors["weight"].shape
        super().__init__(rows, columns)
        self.register_buffer("matrix", tensors["weight"].to(dtype), persistent=False)

    def decode(self, rows: slice, dtype: torch.dtype, room: cpu.Room | None = None) -> Tensor:
        return self.matrix[rows].to(dtype)

    def tiled(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype))


class IntLinear(RowsLinear):
    """Group-quantized integers, kept packed.

    Attributes:
        packed, scales, zeros: as stored (`operators.IntQuantized`), zeros unpacked to int8; or, for GPUs,
        words, high, pairs: in the layout of the kernels (`layouts.IntWords`).
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    words: Tensor
    high: Tensor | None
    pairs: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        operator = IntQuantized.from_tensors(tensors, scheme)
        super().__init__(*operator.shape)
        self.bits, self.group_size, self.span = operator.bits, operator.group_size, operator.span
        self.dtype, device = dtype, operator.codes.device
        if dispatch.has_kernels(device, dtype) and dispatch.has_int_linear(self.bits, self.span, self.in_features):
            self._swizzle(operator)
            return
        self.register_buffer("packed", tensors["weight_packed"], persistent=False)
        self.register_buffer("scales", operator.scales, persistent=False)
        self.register_buffer("zeros", operator.zeros, persistent=False)

    def _swizzle(self, operator: IntQuantized) -> None:
        words = layouts.swizzle_int(operator.codes, operator.scales, operator.zeros, self.bits, self.span, self.dtype)
        self.layout = words.bits, words.group_size
        self._keep(words=words.words, high=words.high, pairs=words.pairs)

    @property
    def stored(self) -> layouts.IntWords:
        """The weight in the kernels' layout."""
        return layouts.IntWords(self.words, self.high, self.pairs, *self.layout)

    def fused(self, x: Tensor, *ends: Tensor | None) -> Tensor:
        result: Tensor = ops.int_linear(x, self.words, self.high, self.pairs, self.out_features, *self.layout, *ends)
        return result

    def decode(self, rows: slice, dtype: torch.dtype, room: cpu.Room | None = None) -> Tensor:
        zeros = None if self.zeros is None else self.zeros[rows]
        packed, scales = self.packed[rows], self.scales[rows]
        return cpu.decode_packed(packed, scales, zeros, self.bits, self.in_features, self.span, dtype, room)

    def tiled(self, x: Tensor) -> Tensor:
        if self.bits > 4 or x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().tiled(x)
        return cpu.packed_linear(x, self.packed, self.scales, self.zeros, self.bits, self.span)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int{self.bits}, group_size={self.group_size}"


class W8A8Linear(RowsLinear):
    """8-bit numbers that meet inputs of 8 bits.

    Attributes:
        codes: int8 or fp8 `[out_features, in_features]`; scales: float32 `[out_features]`.
    """

    codes: Tensor
    scales: Tensor

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
        self._multiplies_bytes = codes.dtype == torch.int8 and dispatch.cpu_capability().int8

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._multiplies_bytes = self.codes.dtype == torch.int8 and dispatch.cpu_capability().int8  # of this machine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W8A8Linear:
        """Moves what is stored as bytes, so that a cast of the model to another dtype leaves codes and scales alone."""
        stored = {"codes": self.codes.dtype, "scales": self.scales.dtype}
        self._view_stored(dict.fromkeys(stored, torch.uint8))
        try:
            super()._apply(fn, recurse)
        finally:  # also where a device has no room for it
            self._view_stored(stored)
        return self

    def _view_stored(self, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, dtype in dtypes.items():
            setattr(self, name, getattr(self, name).view(dtype))

    def decode(self, rows: slice, dtype: torch.dtype, room: cpu.Room | None = None) -> Tensor:
        # Codes are exact in every dtype; scales, in that of the model.
        codes = cpu.decode_fp8(self.codes[rows], dtype, room) if self.codes.is_floating_point() else self.codes[rows]
        return codes.to(dtype) * self.scales[rows, None].to(dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        return self.decode(_ALL, dtype)

    def fused(self, x: Tensor, bias: Tensor | None = None, *residual: Tensor | None) -> Tensor:
        result: Tensor = ops.quantized_rows_linear(x, self.codes, self.scales, bias)
        up, down = residual or (None, None)
        return result if up is None or down is None else result + F.linear(down, up)

    def tiled(self, x: Tensor) -> Tensor:
        if self._multiplies_bytes and x.device.type == "cpu":  # a loaded model may be moved
            return cpu.bytes_linear(x, self.codes, self.scales)
        inputs, factors = quantize_rows(x.reshape(-1, x.shape[-1]), self.codes.dtype)
        return super().tiled(inputs.float().mul_(factors[:, None]).to(x.dtype).view(x.shape))


class Sparse24Linear(RowsLinear):
    """Two of every four columns.

    Attributes:
        values: holds the kept entries `[out_features, in_features / 2]`; indices: as stored, two groups a byte; or,
            for GPUs,
        entries, kept, pairs: in the layout of the kernels (`layouts.SparseWords`).
    """

    values: RowsLinear
    indices: Tensor
    entries: Tensor
    kept: Tensor
    pairs: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        operator = Sparse24.from_tensors(tensors, scheme, from_tensors)
        super().__init__(*operator.shape)
        self.dtype, values = dtype, operator.values
        span = values.span if isinstance(values, IntQuantized) else values.shape[1]
        if dispatch.has_kernels(tensors["indices"].device, dtype) and dispatch.has_sparse_linear(span, values.shape[1]):
            self._swizzle(values, operator.indices)
            return
        inner = _build(below(tensors, "values"), scheme["values"], dtype)
        assert isinstance(inner, RowsLinear)
        self.values = inner
        self.register_buffer("indices", tensors["indices"], persistent=False)

    def _swizzle(self, values: Operator, indices: Tensor) -> None:
        if isinstance(values, IntQuantized):
            words = layouts.swizzle_sparse24(
                values.codes, indices, values.scales, values.zeros, values.bits, values.span, self.dtype
            )
        else:
            words = layouts.swizzle_sparse24(values.dense(self.dtype), indices, None, None, 16, 0, self.dtype)
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

    def decode(self, rows: slice, dtype: torch.dtype, room: cpu.Room | None = None) -> Tensor:
        indices = layouts.unpack_indices(self.indices[rows], self.in_features // 4)
        values = self.values
        kept = values.whole(dtype)[rows] if values.device_layout else values.decode(rows, dtype, room)
        return layouts.expand24(kept, indices)


class ArmorLinear(StoredLinear):
    """Block-diagonal × core × block-diagonal.

    Attributes:
        a, b: hold the blocks, one below the other, where no kernel runs all at once.
    """

    core: Any

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        common = scheme.get("shared")
        parts = below(tensors, "a"), below(tensors, "/" + common if common else "b")
        core = _build({**below(tensors, "core"), **shared(tensors)}, scheme["core"], dtype)
        super().__init__(core.out_features, core.in_features)
        self.core = core
        self._blocks: tuple[Blocks, Blocks] | None = None
        operators = [from_tensors(part, scheme[key]) for part, key in zip(parts, "ab", strict=True)]
        if getattr(core, "device_layout", False) and all(one.shape[1] in (16, 32, 64, 128) for one in operators):
            left, right = (_blocks(one, dtype) for one in operators)
            self._blocks = right, left
            return
        self.a, self.b = (_build(part, scheme[key], dtype) for part, key in zip(parts, "ab", strict=True))

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


class LowRankLinear(StoredLinear):
    """Down to a few numbers, and up again."""

    up: StoredLinear
    down: StoredLinear

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        up, down = (_build(below(tensors, part), scheme[part], dtype) for part in ("up", "down"))
        super().__init__(up.out_features, down.in_features)
        self.up, self.down, self.groups = up, down, scheme.get("groups", 1)

    def raised(self, latents: Tensor) -> Tensor:
        """`[..., rank]` → `[..., out_features]`."""
        if self.groups == 1:
            return self.up.product(latents)
        return grouped_product(latents, self.up.whole(latents.dtype), self.groups)

    def product(self, x: Tensor) -> Tensor:
        return self.raised(self.down.product(x))


class LatentLinear(LowRankLinear):
    """A key or value projection: what attention caches is `packed`.

    Attributes:
        bits: of a number in the cache.
        dtype: of activations.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(tensors, scheme, dtype)
        self.bits, self.rank, self.dtype = scheme["bits"], self.down.out_features, dtype

    def packed(self, x: Tensor) -> Tensor:
        """`[..., in_features]` → what is cached of it."""
        latents = self.down.product(x)
        return latents if self.bits == 16 else layouts.pack_latents(latents, self.bits)

    def unpacked(self, cached: Tensor, dtype: torch.dtype) -> Tensor:
        """What is cached → `[..., rank]`."""
        if self.bits == 16:
            return cached.contiguous().view(dtype)
        return layouts.unpack_latents(cached, self.rank, self.bits, dtype)

    def product(self, x: Tensor) -> Tensor:
        return self.raised(self.unpacked(self.packed(x), x.dtype))


class ResidualLinear(StoredLinear):
    """A linear in stored form, and beside it a low-rank one."""

    base: StoredLinear
    residual: LowRankLinear

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        base = _build({**below(tensors, "base"), **shared(tensors)}, scheme["base"], dtype)
        super().__init__(base.out_features, base.in_features)
        self.base = base
        self.residual = LowRankLinear(below(tensors, "residual"), scheme["residual"], dtype)

    def product(self, x: Tensor) -> Tensor:
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None, up: Tensor | None = None, down: Tensor | None = None) -> Tensor:
        if up is None and self.residual.groups == 1 and type(self.residual.up) is DenseLinear:
            return self.base.affine(x, bias, self.residual.up.matrix.to(x.dtype), self.residual.down.product(x))
        return self.base.affine(x, bias, up, down) + self.residual.product(x)


_MODULES: dict[str, Any] = {
    "dense": DenseLinear, "int": IntLinear, "w8a8": W8A8Linear, "sparse24": Sparse24Linear, "armor": ArmorLinear,
    "lowrank": LowRankLinear, "latent": LatentLinear, "residual": ResidualLinear,
}  # fmt: skip


def _build(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> StoredLinear:
    module: StoredLinear = _MODULES[scheme["kind"]](tensors, scheme, dtype)
    return module


def stored_linear(
    tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], bias: Tensor | None, dtype: torch.dtype
) -> StoredLinear:
    """The module that runs an operator.

    Args:
        tensors, scheme: as `operators.from_tensors` takes them.
        bias: `[out_features]` or None.
        dtype: of activations.
    """
    module = _build(tensors, scheme, dtype)
    module.bias = None if bias is None else bias.to(dtype)
    return module
