"""Bit layouts: from integer codes to what lies on disk, and back.

The packed layout is the dense little-endian bit stream of compressed-tensors' `pack-quantized`: in each row, code `j`
occupies bits `[j * bits, (j + 1) * bits)`, lowest bits first, in int32 words. 3-, 5- and 6-bit codes straddle words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # packed at a time, since the work is done in 64-bit integers
LATENT_SPLIT = 32  # channels of a cached latent that share a scale


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


def compress24(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The two entries of every four that are kept, and where they were.

    Args:
        weight: `[rows, columns]`, columns a multiple of four.
        keep: bool, alike, two true in every four.

    Returns:
        values `[rows, columns / 2]` of weight's dtype, no zero among them negative; indices uint8
        `[rows, columns / 4]`, `first | second << 2`.

    Raises:
        ValueError: a group keeps more or fewer than two.
    """
    rows, columns = weight.shape
    if weight.is_meta:
        indices = torch.empty(rows, columns // 4, dtype=torch.uint8, device="meta")
        return torch.empty(rows, columns // 2, dtype=weight.dtype, device="meta"), indices
    if bool((keep.view(rows, -1, 4).sum(2) != 2).any()):
        raise ValueError("a group of four does not keep exactly two")
    # Kept entries come before the others, each from left to right.
    order = torch.sort((~keep).view(rows, -1, 4).to(torch.uint8), dim=2, stable=True).indices[..., :2]
    values = weight.view(rows, -1, 4).gather(2, order).view(rows, -1)
    return values + 0, (order[..., 0] | order[..., 1] << 2).to(torch.uint8)


def expand24(values: Tensor, indices: Tensor) -> Tensor:
    """The inverse of `compress24`: `[rows, columns]` with zeros elsewhere."""
    rows, groups = indices.shape
    result = torch.zeros(rows, groups, 4, dtype=values.dtype, device=values.device)
    places = torch.stack([indices & 3, indices >> 2], -1).to(torch.int64)
    return result.scatter_(2, places, values.view(rows, groups, 2)).view(rows, -1)


def kept24(indices: Tensor) -> Tensor:
    """bool `[rows, columns]`: which entries are kept."""
    return expand24(
        torch.ones(indices.shape[0], 2 * indices.shape[1], dtype=torch.bool, device=indices.device), indices
    )


def packed_indices(groups: int) -> int:
    """Bytes of a row's indices on disk."""
    return -(-groups // 2)


def pack_indices(indices: Tensor) -> Tensor:
    """Indices as they lie on disk, uint8 `[rows, ceil(groups / 2)]`: two groups a byte, the left in the low half."""
    rows, groups = indices.shape
    if indices.is_meta:
        return torch.empty(rows, packed_indices(groups), dtype=torch.uint8, device="meta")
    padded = torch.nn.functional.pad(indices, (0, groups % 2))
    return padded[:, 0::2] | padded[:, 1::2] << 4


def unpack_indices(packed: Tensor, groups: int) -> Tensor:
    """The inverse of `pack_indices`: uint8 `[rows, groups]`."""
    if packed.is_meta:
        return torch.empty(packed.shape[0], groups, dtype=torch.uint8, device="meta")
    return torch.stack([packed & 15, packed >> 4], -1).view(packed.shape[0], -1)[:, :groups].contiguous()


def latent_bytes(rank: int, bits: int) -> int:
    """Bytes of a token's latent of `rank` channels as 8- or 4-bit codes, scales included."""
    return -(-rank * bits // 8) + 2 * -(-rank // LATENT_SPLIT)


def pack_latents(latents: Tensor, bits: int) -> Tensor:
    """Latents as they lie in a KV cache: codes, and behind them the fp16 scale of every 32 channels.

    Scales are signed, so that the channel of largest size takes the one code without a counterpart.

    Args:
        latents: `[..., rank]`, floats.
        bits: 8 or 4; of these, two codes a byte, the left in the low half.

    Returns:
        uint8 `[..., latent_bytes(rank, bits)]`.
    """
    rank, half = latents.shape[-1], 2 ** (bits - 1)
    splits = torch.nn.functional.pad(latents.float(), (0, -rank % LATENT_SPLIT)).unflatten(-1, (-1, LATENT_SPLIT))
    extremes = splits.gather(-1, splits.abs().argmax(-1, keepdim=True))
    scales = (extremes / -half).half()
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    codes = (splits * inverse).round_().clamp_(-half, half - 1).to(torch.int8).flatten(-2)[..., : rank + rank % 2]
    codes = codes[..., 0::2] & 15 | codes[..., 1::2] << 4 if bits == 4 else codes[..., :rank]
    return torch.cat([codes.contiguous().view(torch.uint8), scales.flatten(-2).view(torch.uint8)], -1)


def unpack_latents(packed: Tensor, rank: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_latents`, up to rounding: `[..., rank]` in `dtype`."""
    count = packed.shape[-1] - 2 * -(-rank // LATENT_SPLIT)
    # Scales behind an odd number of bytes are no halves where they lie.
    codes = packed[..., :count].view(torch.int8)
    scales = packed[..., count:].clone(memory_format=torch.contiguous_format).view(torch.half)
    if bits == 4:
        codes = torch.stack([codes << 4 >> 4, codes >> 4], -1).flatten(-2)[..., :rank]
    return (codes * scales.float().repeat_interleave(LATENT_SPLIT, -1)[..., :rank]).to(dtype)


def cutlass_metadata(indices: Tensor, itemsize: int = 2) -> Tensor:
    """Indices in the order in which CUTLASS's sparse tensor-core GEMM reads them (torch's semi-structured layout).

    Words of four (16-bit values) or eight groups (8-bit values); rows interleaved within 32 or 16, 2 × 2 blocks of
    words transposed, and pairs of word columns stored one after the other.

    Args:
        indices: uint8 `[rows, groups]`; rows a multiple of 32 (16), groups of 8 (16).
        itemsize: bytes of a value, 2 or 1.

    Returns:
        int16 or int32 `[rows, groups / 4 (8)]`, of which only the flat order matters.
    """
    rows, dtype = indices.shape[0], torch.int16 if itemsize == 2 else torch.int32
    height = 32 if itemsize == 2 else 16
    if rows % height or indices.shape[1] % (4 * dtype.itemsize):
        raise ValueError(f"[{rows}, {indices.shape[1]}] groups do not fill tiles of [{height}, {4 * dtype.itemsize}]")
    words = pack_indices(indices).contiguous().view(dtype)
    count = words.shape[1]
    words = words.view(rows // height, height // 8, 8, count).transpose(1, 2).reshape(rows, count)
    words = words.view(rows // 2, 2, count // 2, 2).transpose(1, 3).reshape(rows, count)
    return words.view(rows, count // 2, 2).transpose(0, 1).reshape(rows, count)


def from_cutlass_metadata(metadata: Tensor) -> Tensor:
    """The inverse of `cutlass_metadata`: uint8 `[rows, groups]`."""
    rows, count = metadata.shape
    height = 32 if metadata.dtype == torch.int16 else 16
    words = metadata.reshape(count // 2, rows, 2).transpose(0, 1).reshape(rows, count)
    words = words.view(rows // 2, 2, count // 2, 2).transpose(1, 3).reshape(rows, count)
    words = words.view(rows // height, 8, height // 8, count).transpose(1, 2).reshape(rows, count)
    packed = words.contiguous().view(torch.uint8)
    return unpack_indices(packed, 2 * packed.shape[1])
