"""Products of 16-bit activations with integers of 2, 3, 4 or 8 bits, or floats of 4 or 8, with scales for groups."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import TILE, decode, decode_floats, dot, finish, halves, raw, share, store_part


@triton.constexpr_function
def plane_width(bits, group):
    """Columns of a plane; a tile of 128 has four or eight (`swizzles.plane_width`)."""
    return 16 if bits in (2, 3) or group == 16 else 32


@triton.constexpr_function
def planes_of(bits):
    """Of a word."""
    return {2: 8, 3: 8, 4: 4, 8: 1}[bits]


@triton.constexpr_function
def columns_of(group, floats):
    """That scales in a word belong to."""
    return 4 * group if floats and group in (16, 32) else group


@triton.jit
def load_words(WORDS, tile, plane, rn, NP, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Words `[BN, columns of a plane]` that a plane of a tile is in."""
    width: tl.constexpr = plane_width(BITS, GROUP)
    blocks: tl.constexpr = TILE // width // planes_of(BITS)
    block = tl.cast(tile * blocks + plane // planes_of(BITS), tl.int64)
    return tl.load(WORDS + block * NP * width + rn[:, None] * width + tl.arange(0, width)[None, :])


@triton.jit
def load_high(HIGH, words, tile, rn, NP, BITS: tl.constexpr):
    """The third bits of 3-bit codes, as `decode` takes them; of others anything."""
    if BITS == 3:
        words = load_words(HIGH, tile, 0, rn, NP, 3, 0).to(tl.int16) << 2
    return words


@triton.jit
def load_scales(PAIRS, column, rn, NP, GROUP: tl.constexpr, FLOATS: tl.constexpr):
    """What a column's scale is stored in, `[BN]`; GROUP 0: it is that of the whole row."""
    if GROUP == 0:
        return tl.load(PAIRS + rn)
    return tl.load(PAIRS + column // columns_of(GROUP, FLOATS) * NP + rn)


@triton.jit
def scales_of(stored, SHIFT, PLANE: tl.constexpr, GROUP: tl.constexpr, FLOATS: tl.constexpr, dtype: tl.constexpr):
    """Scales and zeros `[BN, 1]` of a plane; floats have no zeros, and their scales `swizzles.EXPONENTS` more."""
    if not FLOATS:
        scale, zero = halves(stored, dtype)
    else:
        if GROUP == 16 or GROUP == 32:
            digits: tl.constexpr = 4 if GROUP == 16 else 7
            stored = (((stored >> (8 * (PLANE % 4))) & 255) << digits) + SHIFT
        scale = raw(stored.to(tl.int16))
        zero = scale
    return scale[:, None], zero[:, None]


@triton.jit
def decoded(
    words, high, stored, SHIFT, PLANE: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, GROUP: tl.constexpr,
    dtype: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A plane of the weight `[BN, columns of a plane]`."""
    place: tl.constexpr = PLANE % planes_of(BITS)
    scales, zeros = scales_of(stored, SHIFT, PLANE, GROUP, FLOATS, dtype)
    if FLOATS:
        return decode_floats(words, place, BITS, ASM) * scales
    else:
        return (decode(words, high, place, BITS, dtype, ASM) - zeros) * scales


@triton.jit
def accumulate(
    acc, X, rows, WORDS, HIGH, PAIRS, SHIFT, tile, rn, NP, K, BITS: tl.constexpr, FLOATS: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`acc + W xᵀ` over a tile of columns; `rows` `[BM]` are of X, `[., K]`."""
    width: tl.constexpr = plane_width(BITS, GROUP)
    dtype: tl.constexpr = X.dtype.element_ty
    words = load_words(WORDS, tile, 0, rn, NP, BITS, GROUP)
    high = load_high(HIGH, words, tile, rn, NP, BITS)
    stored = load_scales(PAIRS, tile * TILE, rn, NP, GROUP, FLOATS)
    for plane in tl.static_range(TILE // width):
        column = tile * TILE + plane * width + tl.arange(0, width)
        place = X + rows[None, :] * K + column[:, None]
        x = tl.load(place) if EVEN else tl.load(place, mask=(column < K)[:, None], other=0.0)
        if plane > 0 and plane % planes_of(BITS) == 0:
            words = load_words(WORDS, tile, plane, rn, NP, BITS, GROUP)
        if GROUP > 0 and plane > 0 and plane * width % columns_of(GROUP, FLOATS) == 0:
            stored = load_scales(PAIRS, tile * TILE + plane * width, rn, NP, GROUP, FLOATS)
        acc = dot(decoded(words, high, stored, SHIFT, plane, BITS, FLOATS, GROUP, dtype, ASM), x, acc)
    return acc


@triton.jit
def gemm_kernel(
    X, WORDS, HIGH, PAIRS, OUT, BIAS, UP, DOWN, M, N, NP, K, RANK, SHIFT,
    BITS: tl.constexpr, FLOATS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`X Wᵀ` for a few tokens or many: X `[M, K]`, OUT `[M, N]`, or float32 `[splits, M, N]` with SPLIT."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.minimum(rm, M - 1).to(tl.int64)
    first, last = share(tl.cdiv(K, TILE))
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last):
        acc = accumulate(acc, X, rows, WORDS, HIGH, PAIRS, SHIFT, tile, rn, NP, K, BITS, FLOATS, GROUP, EVEN, ASM)
    if SPLIT:
        store_part(acc, OUT, rn, rm, M, N)
    else:
        finish(acc, rn, rm, OUT, BIAS, BIAS, BIAS, UP, DOWN, M, N, RANK, 0, False, HAS_BIAS, HAS_RESIDUAL, BM, BN)


@triton.jit
def gemv_kernel(
    X, WORDS, HIGH, PAIRS, OUT, N, NP, K,
    BITS: tl.constexpr, FLOATS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One token without matrix instructions: float32 parts `[splits, 1, N]`, for `reduce_kernel`; of integers alone.

    Codes meet inputs as they are; zeros and scales follow once for the columns that share them.
    """
    tl.static_assert(not FLOATS, "floats come with the smallest exponents, and sums of them would lose digits")
    width: tl.constexpr = plane_width(BITS, GROUP)
    shared: tl.constexpr = TILE // width if GROUP == 0 or GROUP >= TILE else GROUP // width  # planes to a scale
    dtype: tl.constexpr = X.dtype.element_ty
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    first, last = share(tl.cdiv(K, TILE))
    acc = tl.zeros((BN, width), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        words = load_words(WORDS, tile, 0, rn, NP, BITS, GROUP)
        high = load_high(HIGH, words, tile, rn, NP, BITS)
        for start in tl.static_range(0, TILE // width, shared):
            part, total = tl.zeros((BN, width), tl.float32), tl.zeros((1, width), tl.float32)
            for plane in tl.static_range(start, start + shared):
                column = tile * TILE + plane * width + tl.arange(0, width)
                x = tl.load(X + column) if EVEN else tl.load(X + column, mask=column < K, other=0.0)
                if plane > 0 and plane % planes_of(BITS) == 0:
                    words = load_words(WORDS, tile, plane, rn, NP, BITS, GROUP)
                x = x.to(tl.float32)[None, :]
                part += decode(words, high, plane % planes_of(BITS), BITS, dtype, ASM).to(tl.float32) * x
                total += x
            stored = load_scales(PAIRS, tile * TILE + start * width, rn, NP, GROUP, FLOATS)
            scales, zeros = scales_of(stored, 0, start, GROUP, FLOATS, dtype)
            acc += (part - zeros.to(tl.float32) * total) * scales.to(tl.float32)
    tl.store(OUT + tl.program_id(2).to(tl.int64) * N + rn, tl.sum(acc, 1), mask=rn < N)


@triton.jit
def expand_kernel(
    WORDS, HIGH, PAIRS, OUT, first_row, N, NP, K, SHIFT,
    BITS: tl.constexpr, FLOATS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of the weight from `first_row` on, dense: OUT `[rows, K]`."""
    width: tl.constexpr = plane_width(BITS, GROUP)
    dtype: tl.constexpr = OUT.dtype.element_ty
    tile = tl.program_id(1)
    rn = first_row + tl.program_id(0) * BN + tl.arange(0, BN)
    for plane in tl.static_range(TILE // width):
        column = tile * TILE + plane * width + tl.arange(0, width)
        words = load_words(WORDS, tile, plane, rn, NP, BITS, GROUP)
        high = load_high(HIGH, words, tile, rn, NP, BITS)
        stored = load_scales(PAIRS, tile * TILE + plane * width, rn, NP, GROUP, FLOATS)
        weight = decoded(words, high, stored, SHIFT, plane, BITS, FLOATS, GROUP, dtype, ASM)
        place = OUT + (rn - first_row)[:, None].to(tl.int64) * K + column[None, :]
        tl.store(place, weight.to(dtype), mask=(rn < N)[:, None] & (column < K)[None, :])
