"""Bit layouts: from integer codes to what lies on disk, and back.

The packed layout is the dense little-endian bit stream of compressed-tensors' `pack-quantized`: in each row, code `j`
occupies bits `[j * bits, (j + 1) * bits)`, lowest bits first, in int32 words. 3-, 5- and 6-bit codes straddle words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # packed at a time, since the work is done in 64-bit integers


def packed_words(columns: int, bits: int) -> int:
    """How many int32 words a row of `columns` codes takes."""
    return -(-columns * bits // 32)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes into words.

    Args:
        codes: int8 `[rows, columns]` in `[-2**(bits-1), 2**(bits-1) - 1]`; stored with the offset `2**(bits-1)`.
        bits: 1 to 8.

    Returns:
        int32 `[rows, ceil(columns * bits / 32)]` (of the same device; shapes only on `meta`).
    """
    rows, columns = codes.shape
    words = packed_words(columns, bits)
    if codes.is_meta:
        return torch.empty(rows, words, dtype=torch.int32, device="meta")
    result = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    for start in range(0, rows, _ROWS):
        result[start : start + _ROWS] = _pack_rows(codes[start : start + _ROWS], bits)[:, :words]
    return result


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes.to(torch.int64) + 2 ** (bits - 1)
    lanes = padded.view(rows, -1, 32)  # 32 codes fill exactly `bits` words
    packed = torch.zeros(rows, lanes.shape[1], bits, dtype=torch.int64, device=codes.device)
    for j in range(32):
        word, shift = divmod(j * bits, 32)
        packed[..., word] |= lanes[..., j] << shift
        if shift + bits > 32:
            packed[..., word + 1] |= lanes[..., j] >> (32 - shift)
    packed &= 0xFFFFFFFF
    packed -= (packed >> 31) << 32  # two's complement, so that the cast to int32 keeps every bit
    return packed.view(rows, -1).to(torch.int32)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: int8 `[rows, columns]`."""
    rows = packed.shape[0]
    if packed.is_meta:
        return torch.empty(rows, columns, dtype=torch.int8, device="meta")
    result = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    for start in range(0, rows, _ROWS):
        result[start : start + _ROWS] = _unpack_rows(packed[start : start + _ROWS], bits)[:, :columns]
    return result


def _unpack_rows(packed: Tensor, bits: int) -> Tensor:
    rows, words = packed.shape
    blocks = -(-words // bits)
    padded = torch.zeros(rows, blocks * bits, dtype=torch.int32, device=packed.device)
    padded[:, :words] = packed
    lanes = padded.view(rows, blocks, bits).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(rows, blocks, 32, dtype=torch.int8, device=packed.device)
    mask, offset = 2**bits - 1, 2 ** (bits - 1)
    for j in range(32):
        word, shift = divmod(j * bits, 32)
        value = lanes[..., word] >> shift
        if shift + bits > 32:
            value = value | (lanes[..., word + 1] << (32 - shift))
        codes[..., j] = ((value & mask) - offset).to(torch.int8)
    return codes.view(rows, -1)
