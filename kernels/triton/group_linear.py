"""Products of 16-bit activations with group-quantized integers of 2, 3, 4 or 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import TILE, decode, dot, finish, halves, share, store_part


@triton.constexpr_function
def plane_width(bits):
    """Columns of a plane; a tile of 128 has four or eight."""
    return 32 if bits in (4, 8) else 16


@triton.jit
def load_words(WORDS, tile, plane, rn, NP, BITS: tl.constexpr):
    """Words `[BN, columns of a plane]`: of all planes of a tile at once, of 8 bits those of one."""
    width: tl.constexpr = plane_width(BITS)
    block = tile * 4 + plane if BITS == 8 else tile
    place = tl.cast(block, tl.int64) * NP * width + rn[:, None] * width + tl.arange(0, width)[None, :]
    return tl.load(WORDS + place)


@triton.jit
def load_high(HIGH, words, tile, rn, NP, BITS: tl.constexpr):
    """The third bits of 3-bit codes, as `decode` takes them; of others anything."""
    if BITS == 3:
        words = load_words(HIGH, tile, 0, rn, NP, 3).to(tl.int16) << 2
    return words


@triton.jit
def load_scales(PAIRS, column, rn, NP, GROUP: tl.constexpr, dtype: tl.constexpr):
    """Scales and zeros `[BN, 1]` of the group that a column is in; GROUP 0: of the whole row."""
    group = 0 if GROUP == 0 else column // GROUP
    scale, zero = halves(tl.load(PAIRS + group * NP + rn), dtype)
    return scale[:, None], zero[:, None]


@triton.jit
def accumulate(
    acc, X, rows, WORDS, HIGH, PAIRS, tile, rn, NP, K, BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`acc + W xᵀ` over a tile of columns; `rows` `[BM]` are of X, `[., K]`."""
    width: tl.constexpr = plane_width(BITS)
    dtype: tl.constexpr = X.dtype.element_ty
    words = load_words(WORDS, tile, 0, rn, NP, BITS)
    high = load_high(HIGH, words, tile, rn, NP, BITS)
    scales, zeros = load_scales(PAIRS, tile * TILE, rn, NP, GROUP, dtype)
    for plane in tl.static_range(TILE // width):
        column = tile * TILE + plane * width + tl.arange(0, width)
        place = X + rows[None, :] * K + column[:, None]
        x = tl.load(place) if EVEN else tl.load(place, mask=(column < K)[:, None], other=0.0)
        if BITS == 8 and plane > 0:
            words = load_words(WORDS, tile, plane, rn, NP, BITS)
        if GROUP > 0 and GROUP < TILE and plane > 0:
            scales, zeros = load_scales(PAIRS, tile * TILE + plane * width, rn, NP, GROUP, dtype)
        codes = decode(words, high, plane, BITS, dtype, ASM)
        acc = dot((codes - zeros) * scales, x, acc)
    return acc


@triton.jit
def gemm_kernel(
    X, WORDS, HIGH, PAIRS, OUT, BIAS, UP, DOWN, M, N, NP, K, RANK,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`X Wᵀ` for a few tokens or many: X `[M, K]`, OUT `[M, N]`, or float32 `[splits, M, N]` with SPLIT."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.minimum(rm, M - 1).to(tl.int64)
    first, last = share(tl.cdiv(K, TILE))
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last):
        acc = accumulate(acc, X, rows, WORDS, HIGH, PAIRS, tile, rn, NP, K, BITS, GROUP, EVEN, ASM)
    if SPLIT:
        store_part(acc, OUT, rn, rm, M, N)
    else:
        finish(acc, rn, rm, OUT, BIAS, BIAS, BIAS, UP, DOWN, M, N, RANK, 0, False, HAS_BIAS, HAS_RESIDUAL, BM, BN)


@triton.jit
def gemv_kernel(
    X, WORDS, HIGH, PAIRS, OUT, N, NP, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One token without matrix instructions: float32 parts `[splits, 1, N]`, for `reduce_kernel`.

    Codes meet inputs as they are; zeros and scales follow once for the columns that share them.
    """
    width: tl.constexpr = plane_width(BITS)
    shared: tl.constexpr = TILE // width if GROUP == 0 or GROUP >= TILE else GROUP // width  # planes to a scale
    dtype: tl.constexpr = X.dtype.element_ty
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    first, last = share(tl.cdiv(K, TILE))
    acc = tl.zeros((BN, width), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        words = load_words(WORDS, tile, 0, rn, NP, BITS)
        high = load_high(HIGH, words, tile, rn, NP, BITS)
        for start in tl.static_range(0, TILE // width, shared):
            part, total = tl.zeros((BN, width), tl.float32), tl.zeros((1, width), tl.float32)
            for plane in tl.static_range(start, start + shared):
                column = tile * TILE + plane * width + tl.arange(0, width)
                x = tl.load(X + column) if EVEN else tl.load(X + column, mask=column < K, other=0.0)
                if BITS == 8 and plane > 0:
                    words = load_words(WORDS, tile, plane, rn, NP, BITS)
                x = x.to(tl.float32)[None, :]
                part += decode(words, high, plane, BITS, dtype, ASM).to(tl.float32) * x
                total += x
            scales, zeros = load_scales(PAIRS, tile * TILE + start * width, rn, NP, GROUP, dtype)
            acc += (part - zeros.to(tl.float32) * total) * scales.to(tl.float32)
    tl.store(OUT + tl.program_id(2).to(tl.int64) * N + rn, tl.sum(acc, 1), mask=rn < N)


@triton.jit
def expand_kernel(
    WORDS, HIGH, PAIRS, OUT, first_row, N, NP, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of the weight from `first_row` on, dense: OUT `[rows, K]`."""
    width: tl.constexpr = plane_width(BITS)
    dtype: tl.constexpr = OUT.dtype.element_ty
    tile = tl.program_id(1)
    rn = first_row + tl.program_id(0) * BN + tl.arange(0, BN)
    for plane in tl.static_range(TILE // width):
        column = tile * TILE + plane * width + tl.arange(0, width)
        words = load_words(WORDS, tile, plane, rn, NP, BITS)
        high = load_high(HIGH, words, tile, rn, NP, BITS)
        scales, zeros = load_scales(PAIRS, tile * TILE + plane * width, rn, NP, GROUP, dtype)
        weight = (decode(words, high, plane, BITS, dtype, ASM) - zeros) * scales
        place = OUT + (rn - first_row)[:, None].to(tl.int64) * K + column[None, :]
        tl.store(place, weight.to(dtype), mask=(rn < N)[:, None] & (column < K)[None, :])
