"""CPU paths of 4-bit group-quantized linears, on torch's native kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Signed codes → the layout of torch's CPU kernel.

    Args:
        codes: int8 `[rows, columns]` in [-8, 7].
        scales: `[rows, groups]`.

    Returns:
        uint8 `[rows, columns / 2]` in an order private to the processor, and bf16 `[groups, rows, 2]` of scales and
        (zero) offsets: the kernel computes `(code + 8 - 8) * scale + 0`.
    """
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).to(torch.bfloat16)
    return packed, pairs.contiguous()


def linear_int4(x: Tensor, packed: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """bf16 `[..., columns]` → bf16 `[..., rows]`."""
    flat = x.reshape(-1, x.shape[-1])
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, group_size, pairs)
    return result.view(*x.shape[:-1], -1)
