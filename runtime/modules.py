"""Modules that execute linears in their stored form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cpu, dispatch, layouts
from ..kernels.reference import block_diagonal, grouped_product
from .operators import IntQuantized
from .operators.base import below, shared

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

    def forward(self, x: Tensor) -> Tensor:
        result = self.product(x)
        return result if self.bias is None else result + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class RowsLinear(StoredLinear):
    """One whose rows can be decoded on their own, so that products are made a tile of rows at a time."""

    def decode(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight."""
        raise NotImplementedError

    def whole(self, dtype: torch.dtype) -> Tensor:
        return self.decode(_ALL, dtype)

    def product(self, x: Tensor) -> Tensor:
        return cpu.linear_tiles(x, lambda rows: self.decode(rows, x.dtype), self.out_features)


class DenseLinear(RowsLinear):
    """A plain matrix."""

    matrix: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        rows, columns = tensors["weight"].shape
        super().__init__(rows, columns)
        self.register_buffer("matrix", tensors["weight"].to(dtype), persistent=False)

    def decode(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.matrix[rows].to(dtype)


class IntLinear(RowsLinear):
    """Group-quantized integers, kept packed.

    Attributes:
        packed, scales, zeros: as stored (`operators.IntQuantized`), zeros unpacked to int8.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        operator = IntQuantized.from_tensors(tensors, scheme)
        super().__init__(*operator.shape)
        self.bits, self.group_size, self.span = operator.bits, operator.group_size, operator.span
        self.register_buffer("packed", tensors["weight_packed"], persistent=False)
        self.register_buffer("scales", operator.scales, persistent=False)
        self.register_buffer("zeros", operator.zeros, persistent=False)
        self._int4: tuple[Tensor, Tensor] | None = None
        native = dispatch.has_int4_kernel(
            self.bits, self.out_features, self.span, self.in_features, operator.zeros is None
        )
        if native and dtype == torch.bfloat16 and self.packed.device.type == "cpu":
            self._int4 = cpu.pack_int4(operator.codes, operator.scales)

    def decode(self, rows: slice, dtype: torch.dtype) -> Tensor:
        zeros = None if self.zeros is None else self.zeros[rows]
        packed, scales = self.packed[rows], self.scales[rows]
        return cpu.decode_packed(packed, scales, zeros, self.bits, self.in_features, self.span, dtype)

    def product(self, x: Tensor) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        if self._int4 is not None and dispatch.int4_path(tokens, x.dtype, dispatch.cpu_capability()) == "int4pack":
            return cpu.linear_int4(x, *self._int4, self.span)
        return super().product(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int{self.bits}, group_size={self.group_size}"


class Sparse24Linear(RowsLinear):
    """Two of every four columns.

    Attributes:
        values: holds the kept entries `[out_features, in_features / 2]`.
        indices: as stored, two groups a byte.
    """

    indices: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        values = _build(below(tensors, "values"), scheme["values"], dtype)
        assert isinstance(values, RowsLinear)
        super().__init__(values.out_features, 2 * values.in_features)
        self.values = values
        self.register_buffer("indices", tensors["indices"], persistent=False)

    def decode(self, rows: slice, dtype: torch.dtype) -> Tensor:
        indices = layouts.unpack_indices(self.indices[rows], self.in_features // 4)
        return layouts.expand24(self.values.decode(rows, dtype), indices)


class ArmorLinear(StoredLinear):
    """Block-diagonal × core × block-diagonal.

    Attributes:
        a, b: hold the blocks, one below the other.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        common = scheme.get("shared")
        a = _build(below(tensors, "a"), scheme["a"], dtype)
        b = _build(below(tensors, "/" + common if common else "b"), scheme["b"], dtype)
        assert isinstance(a, RowsLinear)
        assert isinstance(b, RowsLinear)
        super().__init__(a.out_features, b.out_features)
        self.a, self.b = a, b
        self.core = _build({**below(tensors, "core"), **shared(tensors)}, scheme["core"], dtype)

    def product(self, x: Tensor) -> Tensor:
        left, right = (
            part.decode(_ALL, x.dtype).view(-1, part.in_features, part.in_features) for part in (self.a, self.b)
        )
        return block_diagonal(self.core.product(block_diagonal(x, right)), left)


class LowRankLinear(StoredLinear):
    """Down to a few numbers, and up again."""

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

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], dtype: torch.dtype) -> None:
        base = _build({**below(tensors, "base"), **shared(tensors)}, scheme["base"], dtype)
        super().__init__(base.out_features, base.in_features)
        self.base = base
        self.residual = _build(below(tensors, "residual"), scheme["residual"], dtype)

    def product(self, x: Tensor) -> Tensor:
        return self.base.product(x) + self.residual.product(x)


_MODULES: dict[str, Any] = {
    "dense": DenseLinear, "int": IntLinear, "sparse24": Sparse24Linear, "armor": ArmorLinear,
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
