"""CPU paths of group-quantized linears: torch's native int4 kernel, and tile-wise decoding in front of a GEMM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .layouts import unpack_codes
from .reference import dequantize_int

TILE_ROWS = 512  # rows decoded at a time: the tile stays in cache between decoding and the GEMM


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


def decode_packed(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Words of the packed layout → weight `[rows, columns]` in `dtype`, rounded once.

    Args:
        packed: int32 `[rows, words]`; scales `[rows, groups]`; zeros int8 alike or None.
    """
    # A code times a bf16 scale, both exact in bf16, is rounded once by the product: no float32 in between is needed.
    plain = bits == 4 and zeros is None and columns % group_size == 0 and dtype == scales.dtype == torch.bfloat16
    if not plain:
        return dequantize_int(unpack_codes(packed, bits, columns), scales, zeros, group_size, dtype)
    groups = scales.shape[1]
    pairs = _nibble_pairs().index_select(0, packed.contiguous().view(torch.uint8).view(-1).to(torch.int32))
    weight = pairs.view(torch.bfloat16).view(packed.shape[0], -1)[:, :columns].reshape(-1, groups, group_size)
    return weight.mul_(scales[:, :, None]).view(-1, columns)


def linear_tiles(x: Tensor, decode: Callable[[slice], Tensor], rows: int) -> Tensor:
    """`x @ W.T` for x `[..., columns]`; `decode` gives some rows of W, asked for a tile at a time."""
    parts = [F.linear(x, decode(slice(start, min(start + TILE_ROWS, rows)))) for start in range(0, rows, TILE_ROWS)]
    return torch.cat(parts, -1)


_TABLE: list[Tensor] = []


def _nibble_pairs() -> Tensor:
    """int32 `[256]`: for each byte the bf16 values of its two signed codes, side by side."""
    if not _TABLE:
        byte = torch.arange(256)
        pairs = torch.stack([(byte & 15) - 8, (byte >> 4) - 8], -1).to(torch.bfloat16)
        _TABLE.append(pairs.view(torch.int32).flatten().contiguous())
    return _TABLE[0]
