"""Bit layouts: from integer codes to what lies on disk, and back.

The packed layout is the dense little-endian bit stream of compressed-tensors' `pack-quantized`: in each row, code `j`
occupies bits `[j * bits, (j + 1) * bits)`, lowest bits first, in int32 words. 3-, 5- and 6-bit codes straddle words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 256  # packed at a time, since the work is done in 64-bit integers
TILE = 128  # columns, and padded rows, of the kernels' tiles
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


class GroupWords(NamedTuple):
    """Group-quantized integers as the GPU kernels read them (`swizzle_int`).

    Attributes:
        words: codes with the offset `2**(bits-1)`, columns in tiles of 128 and rows padded to a multiple of 128, so
            that a tile of any number of rows is one run of bytes. Plane j of word r in a tile is column
            `j * width + r`: shifting and masking gives neighbouring columns in neighbouring lanes. 2 and 4 bits: int16
            `[tiles, rows, width]`, width 16 and 32; 3 bits: the lower two bits like 2; 5 to 8 bits: int8, signed
            `[tiles * 4, rows, 32]`.
        high: the third bits of 3-bit codes, uint8 `[tiles, rows, 16]`, else None.
        pairs: int32 `[groups, rows]`: the scale in the low half, in the high half the zero point with the offset that
            the kernels' decoded codes have (`zero_offset`), both in the dtype of the activations.
        bits: of a code in `words`: 2, 3, 4 or 8.
        group_size: columns that share a scale; 0 for the whole row.
    """

    words: Tensor
    high: Tensor | None
    pairs: Tensor
    bits: int
    group_size: int


def word_bits(bits: int) -> int:
    """Bits of a code in the kernels' layout: codes of 5 and 6 bits run as bytes."""
    return bits if bits in (2, 3, 4) else 8


def zero_offset(bits: int, dtype: torch.dtype) -> int:
    """What decoded codes exceed the signed ones by: an integer in the lowest bits of a float needs no conversion."""
    return 0 if bits == 8 else 2 ** (bits - 1) + (128 if dtype == torch.bfloat16 else 1024)


def swizzle_int(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, dtype: torch.dtype
) -> GroupWords:
    """Integers → the kernels' layout.

    Args:
        codes: int8 `[rows, columns]`, signed.
        scales: `[rows, groups]`; zeros: int8 alike, or None.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: columns that share a scale.
        dtype: of the activations, bfloat16 or float16.
    """
    bits = word_bits(bits)
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % TILE, 0, -rows % TILE))
    tiles = padded.view(padded.shape[0], -1, TILE).transpose(0, 1)
    if bits == 8:
        high, words = None, tiles.unflatten(2, (4, 32)).transpose(1, 2).reshape(-1, padded.shape[0], 32)
    else:
        tiles = tiles + 2 ** (bits - 1)
        lower = 2 if bits == 3 else bits
        words = _planes(tiles & (2**lower - 1), lower).to(torch.int16)
        high = _planes(tiles >> 2 & 1, 1).to(torch.uint8) if bits == 3 else None
    pairs = _scale_pairs(scales, zeros, bits, group_size, columns, dtype)
    return GroupWords(words.contiguous(), high, pairs, bits, group_size if group_size < columns else 0)


def stacked_rows(parts: Sequence[GroupWords]) -> GroupWords:
    """Weights of the same columns and scheme one below the other, each with its padding."""
    highs = [part.high for part in parts if part.high is not None]
    return parts[0]._replace(
        words=torch.cat([part.words for part in parts], 1),
        high=torch.cat(highs, 1) if highs else None,
        pairs=torch.cat([part.pairs for part in parts], 1),
    )


def _scale_pairs(
    scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """`GroupWords.pairs` of `[rows, groups]`, with groups for the padding of the columns too."""
    rows = scales.shape[0]
    shifted = torch.full_like(scales, zero_offset(bits, dtype), dtype=dtype)
    if zeros is not None:
        shifted += zeros.to(dtype)
    both = torch.stack([scales.to(dtype), shifted], -1).view(torch.int32)[..., 0]
    padded = -(-columns // TILE) * TILE
    missing = -(-padded // group_size) - scales.shape[1] if group_size < columns else 0
    return torch.nn.functional.pad(both, (0, missing, 0, -rows % TILE)).T.contiguous()


def _planes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned `[tiles, rows, 128]` → words, plane j in bits `[j * bits, (j + 1) * bits)`: int32."""
    count = (8 if bits == 1 else 16) // bits
    lanes = codes.to(torch.int32).unflatten(2, (count, -1))
    shifts = bits * torch.arange(count, dtype=torch.int32, device=codes.device)
    return (lanes << shifts[:, None]).sum(2, dtype=torch.int32)


def unswizzle_int(stored: GroupWords, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `swizzle_int`: codes int8 `[rows, columns]`, scales `[rows, groups]`, zeros int8 alike."""
    words, high, pairs, bits, group_size = stored
    if bits == 8:
        codes = words.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)
    else:
        lower = 2 if bits == 3 else bits
        shifts = torch.arange(16 // lower, dtype=torch.int32, device=words.device)
        lanes = words.to(torch.int32)[:, :, None] >> (lower * shifts[:, None]) & (2**lower - 1)
        if high is not None:
            lanes = lanes | (high.to(torch.int32)[:, :, None] >> shifts[:, None] & 1) << 2
        codes = (lanes.flatten(2) - 2 ** (bits - 1)).to(torch.int8)
    codes = codes.transpose(0, 1).flatten(1)[:rows, :columns]
    groups = -(-columns // group_size) if group_size else 1
    both = pairs.T[:rows, :groups].contiguous().view(dtype).unflatten(1, (-1, 2))
    zeros = (both[..., 1] - zero_offset(bits, dtype)).to(torch.int8)
    return codes.contiguous(), both[..., 0].contiguous(), zeros


class SparseWords(NamedTuple):
    """A 2:4 sparse weight as the GPU kernels read it (`swizzle_sparse24`).

    Columns come in tiles of `16 * width`, of four quarters; word r of a quarter is its r-th group of four.

    Attributes:
        values: the first and the second kept entry of every group: floats or int8 `[tiles * 8, rows, width]`, for each
            quarter first and second; of 4 bits int16 `[tiles * 2, rows, width]`, a word for the four of two quarters.
        kept: int16 `[tiles, rows, width]`: of each quarter four bits, bit p telling that column p of the group is kept.
        pairs: as in `GroupWords`; empty for floats.
        bits: of a value: 4, 8 or 16.
        group_size: columns of the sparse matrix that share a scale; 0 for the whole row.
        width: 16 or 32.
    """

    values: Tensor
    kept: Tensor
    pairs: Tensor
    bits: int
    group_size: int
    width: int


def sparse_width(columns: int, group_size: int) -> int:
    """Groups of four in a quarter of a tile, which has one scale: 32 where columns and scales allow, else 16.

    Args:
        group_size: columns of the sparse matrix that share a scale; 0 for the whole row.
    """
    return 32 if columns % 512 == 0 and group_size % 128 == 0 else 16


def swizzle_sparse24(
    entries: Tensor, indices: Tensor, scales: Tensor | None, zeros: Tensor | None, bits: int, group_size: int,
    dtype: torch.dtype,
) -> SparseWords:  # fmt: skip
    """A 2:4 sparse weight → the kernels' layout.

    Args:
        entries: the kept ones `[rows, columns / 2]`, floats or int8, signed.
        indices: uint8 `[rows, columns / 4]`, `first | second << 2`.
        scales, zeros, bits: of integers, as `swizzle_int` takes them; None, None and 16 for floats.
        group_size: kept entries that share a scale.
        dtype: of the activations, bfloat16 or float16.
    """
    rows, kept = entries.shape
    group_size = 2 * group_size if group_size < kept and bits < 16 else 0
    width = sparse_width(2 * kept, group_size)
    padding = (0, -indices.shape[1] % (4 * width), 0, -rows % TILE)
    if bits == 16:
        kind, pairs, entries = 16, entries.new_empty(0, dtype=torch.int32), entries.to(dtype)
    else:
        kind = 4 if bits <= 4 else 8
        assert scales is not None
        pairs = _scale_pairs(scales, zeros, word_bits(bits), group_size // 2 or kept, kept, dtype)
        entries = entries + 2 ** (bits - 1) if kind == 4 else entries
    first, second = (_quarters(entries[:, place::2], padding, width) for place in (0, 1))
    both = torch.stack([first, second], 2)  # [tiles, quarters, 2, rows, width]
    if kind == 4:
        both = both.unflatten(1, (2, 2)).flatten(2, 3).permute(0, 1, 3, 2, 4)  # [tiles, 2, rows, 4, width]
        values = _planes(both.flatten(3).flatten(0, 1), 4).to(torch.int16)
    else:
        values = both.flatten(0, 2).contiguous()
    maps = _quarters((1 << (indices & 3)) | (1 << (indices >> 2)), padding, width)
    words = _planes(maps.transpose(1, 2).flatten(2), 4).to(torch.int16)
    return SparseWords(values, words, pairs, kind, group_size, width)


def _quarters(per_group: Tensor, padding: tuple[int, ...], width: int) -> Tensor:
    """`[rows, groups]` → `[tiles, 4, rows, width]`."""
    padded = torch.nn.functional.pad(per_group, padding)
    return padded.view(padded.shape[0], -1, 4, width).permute(1, 2, 0, 3)


def unswizzle_sparse24(stored: SparseWords, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The inverse of `swizzle_sparse24`: kept entries `[rows, columns / 2]`, of 4 bits with the offset that they are
    stored with, and indices uint8 `[rows, columns / 4]`."""
    values, kept, _, bits, _, width = stored
    shifts = 4 * torch.arange(4, dtype=torch.int32, device=kept.device)[:, None, None]
    if bits == 4:
        values = (values.to(torch.int32)[:, None] >> shifts & 15).to(torch.int8).unflatten(1, (2, 2)).flatten(0, 1)
    both = values.reshape(-1, 4, 2, values.shape[-2], width).permute(3, 0, 1, 4, 2).flatten(1)
    maps = (kept.to(torch.int32)[:, None] >> shifts & 15).permute(2, 0, 1, 3).flatten(1)[:rows, : columns // 4]
    first = torch.where(maps & 1 != 0, 0, torch.where(maps & 2 != 0, 1, 2))
    second = torch.where(maps & 8 != 0, 3, torch.where(maps & 4 != 0, 2, 1))
    return both[:rows, : columns // 2].contiguous(), (first | second << 2).to(torch.uint8)


def pair_order(head_dim: int, rotated: int) -> Tensor:
    """The channels of a head so that the rotary embedding pairs channel i with `i + head_dim / 2`.

    Args:
        rotated: leading channels that it turns, halves paired; the others are paired too and left as they are.
    """
    channels = torch.arange(head_dim)
    parts = [part.view(2, -1) for part in (channels[:rotated], channels[rotated:])]
    return torch.cat([part[half] for half in (0, 1) for part in parts])


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
