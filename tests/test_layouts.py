"""The packed layout: round trips for every width, and the same words as compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.kernels.layouts import compress24, pack_codes, packed_words, unpack_codes
from compressor.kernels.swizzles import (
    TILE,
    pair_order,
    swizzle_int,
    swizzle_sparse24,
    unswizzle_int,
    unswizzle_sparse24,
)  # fmt: skip

BITS = st.integers(1, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).to(torch.int8)


@settings(deadline=None, max_examples=150)
@given(rows=st.integers(1, 5), columns=st.integers(1, 200), bits=BITS, seed=st.integers(0, 9))
def test_unpack_undoes_pack(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, packed_words(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("columns", [32, 96, 172, 7])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes(6, columns, bits, 1)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(pack_codes(codes, bits), theirs)
    assert torch.equal(unpack_codes(theirs, bits, columns), unpack_from_int32(theirs, bits, codes.shape))


def test_every_bit_has_its_place() -> None:
    # Code j of a row is bits [3 j, 3 j + 3) of the little-endian stream, stored with the offset 4.
    codes = random_codes(1, 64, 3, 2)
    stream = sum((int(code) + 4) << (3 * j) for j, code in enumerate(codes[0]))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(6)]
    assert [int(word) & 0xFFFFFFFF for word in pack_codes(codes, 3)[0]] == words


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 140), columns=st.integers(1, 300), bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([16, 32, 64, 128, 1000]), symmetric=st.booleans(), seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_unswizzle_undoes_swizzle(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, seed: int, dtype: torch.dtype
) -> None:
    codes = random_codes(rows, columns, bits, seed)
    groups = -(-columns // group)
    scales = torch.randn(rows, groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    zeros = None if symmetric else random_codes(rows, groups, bits, seed + 1)
    stored = swizzle_int(codes, scales, zeros, bits, group, dtype)
    assert stored.words.shape[1] % TILE == 0
    found = unswizzle_int(stored, rows, columns, dtype)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], scales)
    assert torch.equal(found[2], torch.zeros_like(found[2]) if zeros is None else zeros)


def test_planes_are_runs_of_columns() -> None:
    # Nibble j of word r in a tile is column 32 j + r, offset by 8.
    codes = random_codes(128, 256, 4, 5)
    stored = swizzle_int(codes, torch.ones(128, 2), None, 4, 128, torch.float16)
    word = int(stored.words[1, 7, 3]) & 0xFFFF
    assert [(word >> 4 * j & 15) - 8 for j in range(4)] == [int(codes[7, 128 + 32 * j + 3]) for j in range(4)]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 140), groups=st.integers(1, 150), bits=st.sampled_from([3, 4, 8, 16]),
    group=st.sampled_from([32, 64, 1000]), seed=st.integers(0, 9),
)  # fmt: skip
def test_unswizzle_undoes_swizzle_of_sparse_weights(rows: int, groups: int, bits: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, groups, 4, generator=generator).argsort(2).argsort(2) < 2
    _, indices = compress24(torch.randn(rows, 4 * groups), keep.view(rows, -1))
    entries = random_codes(rows, 2 * groups, min(bits, 8), seed)
    if bits == 16:
        entries = entries.half()
    scales = None if bits == 16 else torch.ones(rows, -(-2 * groups // group))
    stored = swizzle_sparse24(entries, indices, scales, None, bits, group, torch.float16)
    values, places = unswizzle_sparse24(stored, rows, 4 * groups)
    assert torch.equal(places, indices)
    assert torch.equal(values - 2 ** (bits - 1) if bits <= 4 else values, entries)


@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (12, 4), (16, 8)])
def test_pairs_of_a_head(head_dim: int, rotated: int) -> None:
    order = pair_order(head_dim, rotated).tolist()
    assert sorted(order) == list(range(head_dim))
    half = head_dim // 2
    assert [(order[i], order[half + i]) for i in range(rotated // 2)] == [
        (i, i + rotated // 2) for i in range(rotated // 2)
    ]
