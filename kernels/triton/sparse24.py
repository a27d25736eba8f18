"""Products with a 2:4 sparse matrix, on its own or between ARMOR's block-diagonal ones."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import INTERPRET, decode, dot, finish, halves, share, store_part


@triton.jit
def scatter_kernel(X, PLANES, B, BSCALE, M, K, BLOCK: tl.constexpr, CODES: tl.constexpr, BM: tl.constexpr):
    """`z = B x` in four planes: X `[M, K]` → PLANES `[4, M, K / 4]`, plane p holding columns p, p + 4, p + 8, ...

    Args:
        B: `[K, BLOCK]`, diagonal blocks one below the other, or int8 with BSCALE `[K]`.
    """
    dtype: tl.constexpr = X.dtype.element_ty
    inner = tl.arange(0, BLOCK)
    column = tl.program_id(0) * BLOCK + inner
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.minimum(rm, M - 1).to(tl.int64)
    x = tl.load(X + rows[None, :] * K + column[:, None])
    block = tl.load(B + column[:, None] * BLOCK + inner[None, :])
    block = block.to(tl.float32) if INTERPRET else block.to(dtype)
    z = dot(block, x, tl.zeros((BLOCK, BM), tl.float32))
    if CODES:
        z *= tl.load(BSCALE + column).to(tl.float32)[:, None]
    place = PLANES + ((column % 4)[:, None] * M + rows[None, :]) * (K // 4) + (column // 4)[:, None]
    tl.store(place, z.to(dtype), mask=(rm < M)[None, :])


@triton.constexpr_function
def _planes_asm(quarter):
    """Four dense planes of the two groups of a register (NVIDIA).

    A bit of the map, moved to the sign of its lane's upper byte, becomes a mask of the lane by one PRMT; LOP3 0xd8 is
    `m0 ? second : first`, 0xe4 `m3 ? first : second`.
    """
    masks = "".join(
        f"shl.b32 t, $4, {15 - 4 * quarter - plane}; prmt.b32 m{plane}, t, 0, 0xbb99; " for plane in range(4)
    )
    return (
        "{ .reg .b32 t, m0, m1, m2, m3; " + masks + "and.b32 $0, $5, m0; and.b32 $3, $6, m3; "
        "lop3.b32 t, $5, $6, m0, 0xd8; and.b32 $1, t, m1; lop3.b32 t, $5, $6, m3, 0xe4; and.b32 $2, t, m2; }"
    )


@triton.jit
def dense_planes(kept, first, second, QUARTER: tl.constexpr, ASM: tl.constexpr):
    """The groups of four of a quarter of a tile as four dense planes, columns 0, 1, 2 and 3 of every group.

    Args:
        kept: int16, four bits a group, bit p telling that column p is kept.
        first, second: the two kept entries from left to right.
    """
    if ASM and not INTERPRET:
        asm: tl.constexpr = _planes_asm(QUARTER)
        if first.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                asm, "=&r,=&r,=&r,=&r,r,r,r", [kept, first, second], is_pure=True, pack=2,
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                asm, "=&r,=&r,=&r,=&r,r,r,r", [kept, first, second], is_pure=True, pack=2,
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            )  # fmt: skip
    else:
        bits = kept.to(tl.int32) >> (4 * QUARTER)
        zero = tl.zeros_like(first)
        middle = tl.where((bits & 1) != 0, second, first)
        right = tl.where((bits & 8) != 0, first, second)
        return (
            tl.where((bits & 1) != 0, first, zero), tl.where((bits & 2) != 0, middle, zero),
            tl.where((bits & 4) != 0, right, zero), tl.where((bits & 8) != 0, second, zero),
        )  # fmt: skip


@triton.jit
def quarter_tile(
    kept, VALUES, PAIRS, tile, QUARTER: tl.constexpr, rn, NP, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Four dense planes `[BN, WIDTH]` of a quarter of a tile (`swizzles.swizzle_sparse24`)."""
    inner = rn[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    size = tl.cast(NP, tl.int64) * WIDTH
    if BITS == 4:  # a word holds both entries of two quarters
        first = tl.load(VALUES + (tile * 2 + QUARTER // 2) * size + inner)
        second = first
    else:
        first = tl.load(VALUES + (tile * 8 + QUARTER * 2) * size + inner)
        second = tl.load(VALUES + (tile * 8 + QUARTER * 2 + 1) * size + inner)
    if BITS < 16:
        group = 0 if GROUP == 0 else (tile * 4 + QUARTER) * 4 * WIDTH // GROUP
        scale, zero = halves(tl.load(PAIRS + group * NP + rn), dtype)
        plane: tl.constexpr = QUARTER % 2 * 2
        first = (decode(first, first, plane, BITS, dtype, ASM) - zero[:, None]) * scale[:, None]
        second = (decode(second, second, plane + 1, BITS, dtype, ASM) - zero[:, None]) * scale[:, None]
    elif INTERPRET:
        first, second = first.to(tl.float32), second.to(tl.float32)
    return dense_planes(kept, first, second, QUARTER, ASM)


@triton.jit
def load_kept(KEPT, tile, rn, NP, WIDTH: tl.constexpr):
    """The maps of a tile's groups, int16 `[BN, WIDTH]`."""
    return tl.load(KEPT + tl.cast(tile, tl.int64) * NP * WIDTH + rn[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def accumulate(
    acc, PLANES, rows, VALUES, KEPT, PAIRS, tile, rn, M, NP, K, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`acc + W zᵀ` over a tile of `16 WIDTH` columns."""
    dtype: tl.constexpr = PLANES.dtype.element_ty
    kept = load_kept(KEPT, tile, rn, NP, WIDTH)
    for quarter in tl.static_range(4):
        weights = quarter_tile(kept, VALUES, PAIRS, tile, quarter, rn, NP, BITS, GROUP, WIDTH, dtype, ASM)
        column = (tile * 4 + quarter) * WIDTH + tl.arange(0, WIDTH)
        for plane in tl.static_range(4):
            place = PLANES + (plane * M + rows)[None, :] * (K // 4) + column[:, None]
            z = tl.load(place) if EVEN else tl.load(place, mask=(column < K // 4)[:, None], other=0.0)
            acc = dot(weights[plane], z, acc)
    return acc


@triton.jit
def gemm_kernel(
    PLANES, VALUES, KEPT, PAIRS, OUT, A, ASCALE, BIAS, UP, DOWN, M, N, NP, K, RANK,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, A_CODES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`Z Wᵀ` of a 2:4 sparse W and what follows it: PLANES `[4, M, K / 4]`, OUT `[M, N]`, or float32
    `[splits, M, N]` with SPLIT."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.minimum(rm, M - 1).to(tl.int64)
    first, last = share(tl.cdiv(K, 16 * WIDTH))
    acc = tl.zeros((BN, BM), tl.float32)
    for tile in tl.range(first, last):
        acc = accumulate(
            acc, PLANES, rows, VALUES, KEPT, PAIRS, tile, rn, M, NP, K, BITS, GROUP, WIDTH, EVEN, ASM
        )  # fmt: skip
    if SPLIT:
        store_part(acc, OUT, rn, rm, M, N)
    else:
        finish(
            acc, rn, rm, OUT, A, ASCALE, BIAS, UP, DOWN, M, N, RANK, BLOCK, A_CODES, HAS_BIAS, HAS_RESIDUAL, BM, BN
        )  # fmt: skip


@triton.jit
def expand_kernel(
    VALUES, KEPT, PAIRS, OUT, first_row, N, NP, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of W from `first_row` on, dense, its columns in the order of the planes: OUT `[rows, 4, K / 4]`."""
    dtype: tl.constexpr = OUT.dtype.element_ty
    tile = tl.program_id(1)
    rn = first_row + tl.program_id(0) * BN + tl.arange(0, BN)
    kept = load_kept(KEPT, tile, rn, NP, WIDTH)
    for quarter in tl.static_range(4):
        weights = quarter_tile(kept, VALUES, PAIRS, tile, quarter, rn, NP, BITS, GROUP, WIDTH, dtype, ASM)
        column = (tile * 4 + quarter) * WIDTH + tl.arange(0, WIDTH)
        mask = (rn < N)[:, None] & (column < K // 4)[None, :]
        for plane in tl.static_range(4):
            place = OUT + (rn - first_row)[:, None].to(tl.int64) * K + plane * (K // 4) + column[None, :]
            tl.store(place, weights[plane].to(dtype), mask=mask)
