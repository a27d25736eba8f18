"""A mixture of gated MLPs with group-quantized weights, over tokens sorted by expert.

Tokens of an expert fill blocks of BM slots; SLOTS holds for each the number of a pair `token * top_k + choice`, or how
many pairs there are where the block has room left; OWNERS the expert of each block, or -1 behind the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import TILE
from .group_linear import accumulate


@triton.jit
def of_expert(
    WORDS, HIGH, PAIRS, SLOTS, expert, words_stride, high_stride, pairs_stride, BM: tl.constexpr
):  # fmt: skip
    """An expert's weights, and the slots of this program's block."""
    slot = tl.load(SLOTS + tl.program_id(1) * BM + tl.arange(0, BM))
    return WORDS + expert * words_stride, HIGH + expert * high_stride, PAIRS + expert * pairs_stride, slot


@triton.jit
def gate_up_kernel(
    X, WORDS, HIGH, PAIRS, OUT, SLOTS, OWNERS, pairs_count, top_k, N, NP, K, words_stride, high_stride, pairs_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`silu(gate x) * (up x)`: X `[tokens, K]`, OUT `[pairs, N]`; rows of gate, padded to NP, precede those of up."""
    expert = tl.load(OWNERS + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    WORDS, HIGH, PAIRS, slot = of_expert(WORDS, HIGH, PAIRS, SLOTS, expert, words_stride, high_stride, pairs_stride, BM)
    rows = tl.minimum(slot, pairs_count - 1).to(tl.int64) // top_k
    gate, up = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(0, tl.cdiv(K, TILE)):
        gate = accumulate(gate, X, rows, WORDS, HIGH, PAIRS, 0, tile, rn, 2 * NP, K, BITS, False, GROUP, EVEN, ASM)
        up = accumulate(up, X, rows, WORDS, HIGH, PAIRS, 0, tile, rn + NP, 2 * NP, K, BITS, False, GROUP, EVEN, ASM)
    result = gate / (1 + tl.exp(-gate)) * up
    place = OUT + slot.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(place, result.to(OUT.dtype.element_ty), mask=(rn < N)[:, None] & (slot < pairs_count)[None, :])


@triton.jit
def down_kernel(
    X, WORDS, HIGH, PAIRS, OUT, SLOTS, OWNERS, COEFFICIENTS, pairs_count, N, NP, K, words_stride, high_stride,
    pairs_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`coefficient * (down x)` of each pair: X `[pairs, K]`, OUT `[pairs, N]`."""
    expert = tl.load(OWNERS + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    WORDS, HIGH, PAIRS, slot = of_expert(WORDS, HIGH, PAIRS, SLOTS, expert, words_stride, high_stride, pairs_stride, BM)
    rows = tl.minimum(slot, pairs_count - 1).to(tl.int64)
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(0, tl.cdiv(K, TILE)):
        acc = accumulate(acc, X, rows, WORDS, HIGH, PAIRS, 0, tile, rn, NP, K, BITS, False, GROUP, EVEN, ASM)
    acc *= tl.load(COEFFICIENTS + rows).to(tl.float32)[None, :]
    place = OUT + slot.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(place, acc.to(OUT.dtype.element_ty), mask=(rn < N)[:, None] & (slot < pairs_count)[None, :])
