"""Plain torch twins: what every kernel computes, written to be read and to be compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def expand_groups(per_group: Tensor, columns: int, group_size: int) -> Tensor:
    """Repeat `[rows, groups]` along the columns; the last group may be ragged."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def dequantize_int(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """`(codes - zeros) * scales` per group.

    Args:
        codes: int8 `[rows, columns]`.
        scales: `[rows, groups]`, any sign.
        zeros: int8 `[rows, groups]`, or None when symmetric.
        dtype: of the result; the product is rounded once, from float32 (float64 when asked for).
    """
    columns = codes.shape[1]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = codes.to(exact)
    if zeros is not None:
        values -= expand_groups(zeros, columns, group_size).to(exact)
    values *= expand_groups(scales, columns, group_size).to(exact)
    return values.to(dtype)


def linear_int(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ W.T + bias` with the dequantized weight in x's dtype; x is `[..., columns]`."""
    return F.linear(x, dequantize_int(codes, scales, zeros, group_size, x.dtype), bias)


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """`y = D x` for every row of `[..., n]`, D having `blocks` `[n / b, b, b]` on its diagonal."""
    count, size, _ = blocks.shape
    parts = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(parts, blocks.mT).transpose(0, 1).reshape(x.shape)


def grouped_product(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`[..., groups * r]` → `[..., rows]`: each group of rows of `weight` `[rows, r]` reads its own r numbers."""
    parts = x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)
    product = torch.bmm(parts, weight.view(groups, -1, weight.shape[1]).mT)
    return product.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])
