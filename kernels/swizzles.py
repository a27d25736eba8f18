"""What GPU kernels read: the layouts of weights in memory, from those on disk and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # columns, and padded rows, of the kernels' tiles


class GroupWords(NamedTuple):
    """Numbers that share scales in groups, as the GPU kernels read them (`swizzle_int`, `swizzle_floats`).

    Attributes:
        words: integers with the offset `2**(bits-1)`, or bits of floats, columns in tiles of 128 and rows padded to a
            multiple of 128, so that a tile of any number of rows is one run of bytes. Tiles come in blocks of as many
            columns as a word has codes of `plane_width`: plane j of word r is column `j * width + r`, so that shifting
            and masking gives neighbouring columns in neighbouring lanes. 2 and 4 bits: int16
            `[tiles * blocks, rows, width]`; 3 bits: the lower two bits like 2; 5 to 8 bits: int8, signed.
        high: the third bits of 3-bit codes, uint8 `[tiles, rows, 16]`, else None.
        pairs: of integers int32 `[groups, rows]`: the scale in the low half, in the high half the zero point with the
            offset that the kernels' decoded codes have (`zero_offset`), both in the dtype of the activations; of floats
            what `_float_scales` makes.
        bits: of a code in `words`: 2, 3, 4 or 8.
        group_size: columns that share a scale; 0 for the whole row.
        floats: whether they are E2M1 or E4M3.
        shift: what the scales of floats lack as bits of bfloat16.
    """

    words: Tensor
    high: Tensor | None
    pairs: Tensor
    bits: int
    group_size: int
    floats: bool = False
    shift: int = 0


# By the bits of a float, what its exponent lacks where it is taken for one of bfloat16: scales have it.
EXPONENTS = {4: 126, 8: 120}


def plane_width(bits: int, group_size: int) -> int:
    """Columns of a plane, which share a scale: 16 or 32."""
    return 16 if bits in (2, 3) or group_size == 16 else 32


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
    columns = codes.shape[1]
    group_size = group_size if group_size < columns else 0
    shifted = codes if bits == 8 else codes + 2 ** (bits - 1)
    lower = shifted & 3 if bits == 3 else shifted
    high = _planes(_blocks(shifted >> 2 & 1, 16, 8), 1).to(torch.uint8) if bits == 3 else None
    words = _words(lower, bits, plane_width(bits, group_size))
    pairs = _scale_pairs(scales, zeros, bits, group_size or columns, columns, dtype)
    return GroupWords(words, high, pairs, bits, group_size)


def swizzle_floats(codes: Tensor, scales: Tensor, bits: int, group_size: int) -> GroupWords | None:
    """Floats of few bits → the kernels' layout, for activations in bfloat16; None where that cannot hold the scales.

    Args:
        codes: their bits, uint8 `[rows, columns]` (`Floats.as_bytes`), of E2M1 or E4M3.
        scales: float32 `[rows, groups]`: for groups of 16 positive and of four digits, of 32 powers of two, larger ones
            as bfloat16 has them.
        bits: 4 or 8.
        group_size: columns that share a scale: 16, 32 or whole tiles, or all.
    """
    columns = codes.shape[1]
    group_size = group_size if group_size < columns else 0
    found = _float_scales(scales, bits, group_size)
    if found is None or (bits == 8 and bool((codes & 127 == 127).any())):  # NaN, which the kernel takes for a number
        return None
    words, shift = found
    nothing = (scales == 0).repeat_interleave(group_size or columns, 1)[:, :columns]
    numbers = _words(codes.masked_fill(nothing, 0).view(torch.int8), bits, plane_width(bits, group_size))
    if group_size:
        span, columns = group_size * (4 if group_size in (16, 32) else 1), -(-columns // TILE) * TILE
    else:
        span = columns
    return GroupWords(numbers, None, _padded_groups(words, span, columns), bits, group_size, True, shift)


def _float_scales(scales: Tensor, bits: int, group_size: int) -> tuple[Tensor, int] | None:
    """Scales times `2**EXPONENTS[bits]` as bits of bfloat16, less a shift: int32, and the shift.

    In groups of 16 and 32, each is a byte of five or eight bits of the exponent and three or none of the mantissa, and
    four neighbours share a word.
    """
    whole = scales.to(torch.bfloat16)
    patterns = whole.view(torch.int16).to(torch.int32)
    largest = int((patterns & 0x7FFF).amax())
    subnormal = bool(((patterns & 0x7F80 == 0) & (scales != 0)).any())
    if not torch.equal(whole.float(), scales) or subnormal or (largest >> 7) + EXPONENTS[bits] > 254:
        return None
    more = EXPONENTS[bits] << 7
    if group_size not in (16, 32):
        return patterns + more, 0
    digits = 7 if group_size == 32 else 4
    least = 0 if group_size == 32 else max(0, (largest >> 7) - 31) << 7
    fields = (patterns - least >> digits).masked_fill(scales == 0, 0)
    if bool(((fields << digits) + least != patterns)[scales != 0].any()) or int(fields.amin()) < 0:
        return None
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % 4)).unflatten(1, (-1, 4))
    shifts = 8 * torch.arange(4, dtype=torch.int32, device=scales.device)
    return (fields << shifts).sum(2, dtype=torch.int32), least + more


def _words(codes: Tensor, bits: int, width: int) -> Tensor:
    """int8 `[rows, columns]`, unsigned but for 8 bits → `GroupWords.words`."""
    if bits == 8:
        return _blocks(codes, width, 1)
    lower = 2 if bits == 3 else bits
    return _planes(_blocks(codes, width, 16 // lower), lower).to(torch.int16)


def _blocks(codes: Tensor, width: int, planes: int) -> Tensor:
    """`[rows, columns]` → `[blocks, rows, planes * width]`, with the padding."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % TILE, 0, -rows % TILE))
    return padded.view(padded.shape[0], -1, planes * width).transpose(0, 1).contiguous()


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
    shifted = torch.full_like(scales, zero_offset(bits, dtype), dtype=dtype)
    if zeros is not None:
        shifted += zeros.to(dtype)
    return _padded_groups(torch.stack([scales.to(dtype), shifted], -1).view(torch.int32)[..., 0], group_size, columns)


def _padded_groups(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """`[rows, groups]` → `[groups, rows]`, with groups for the padding of the columns too."""
    rows, groups = per_group.shape
    padded = -(-columns // TILE) * TILE
    missing = -(-padded // group_size) - groups if group_size < columns else 0
    return torch.nn.functional.pad(per_group, (0, missing, 0, -rows % TILE)).T.contiguous()


def _planes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned `[blocks, rows, columns]` → words, plane j in bits `[j * bits, (j + 1) * bits)`: int32."""
    count = (8 if bits == 1 else 16) // bits
    lanes = codes.to(torch.int32).unflatten(2, (count, -1))
    shifts = bits * torch.arange(count, dtype=torch.int32, device=codes.device)
    return (lanes << shifts[:, None]).sum(2, dtype=torch.int32)


def unswizzle_int(stored: GroupWords, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `swizzle_int`: codes int8 `[rows, columns]`, scales `[rows, groups]`, zeros int8 alike."""
    words, high, pairs, bits, group_size, *_ = stored
    if bits == 8:
        codes = words
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
