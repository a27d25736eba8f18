"""The packed layout: round trips for every width, and the same words as compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.kernels.layouts import pack_codes, packed_words, unpack_codes

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
