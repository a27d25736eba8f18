"""Activations as 8-bit numbers, and what a product of these is worth."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_kernel(X, CODES, SCALES, K, LARGEST: tl.constexpr, BK: tl.constexpr):
    """Each row over its largest size: X `[M, K]` → CODES alike (int8 or fp8), SCALES float32 `[M]`."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BK)
    largest = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        column = start + inner
        largest = tl.maximum(largest, tl.abs(tl.load(X + row * K + column, mask=column < K, other=0.0).to(tl.float32)))
    scale = tl.maximum(tl.max(largest, 0), 1e-12) / LARGEST
    tl.store(SCALES + row, scale)
    for start in range(0, K, BK):
        column = start + inner
        x = tl.load(X + row * K + column, mask=column < K, other=0.0).to(tl.float32) / scale
        if CODES.dtype.element_ty == tl.int8:
            x += 12582912.0  # 1.5 * 2**23: the sum is rounded to whole numbers, halves to even
            x -= 12582912.0
        tl.store(CODES + row * K + column, x.to(CODES.dtype.element_ty), mask=column < K)


@triton.jit
def rescale_kernel(
    SUMS, OUT, ROW_SCALES, COLUMN_SCALES, BIAS, N, HAS_BIAS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """int32 sums `[M, N]` times the scales of row and column, plus the bias."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = column < N
    result = tl.load(SUMS + row * N + column, mask=mask, other=0).to(tl.float32) * tl.load(ROW_SCALES + row)
    result *= tl.load(COLUMN_SCALES + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(BIAS + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row * N + column, result.to(OUT.dtype.element_ty), mask=mask)
