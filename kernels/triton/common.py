"""What the kernels share: decoding of codes, products that the interpreter can do too, and the end of a GEMM.

Operands are swapped: a tile of accumulators is `[rows of the weight, tokens]`, so that the decoded weight is the first
operand of the matrix instruction, which Hopper reads from registers, and few tokens waste no width.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as bare 16-bit integers and knows no assembly: there, arithmetic is float32.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
TILE = tl.constexpr(128)  # `swizzles.TILE`


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b`, accumulated in float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b.to(a.dtype), acc)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 in a narrower dtype; as it is in the interpreter."""
    if INTERPRET:
        return x
    else:
        return x.to(dtype)


@triton.jit
def halves(pair, dtype: tl.constexpr):
    """int32 words → the two 16-bit floats that they hold, low half first."""
    if dtype == tl.bfloat16:  # the upper half of a float32
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return rounded(low, dtype), rounded(high, dtype)


@triton.jit
def raw(bits):
    """int16 → the bfloat16 that it is; float32 in the interpreter."""
    if INTERPRET:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.bfloat16, bitcast=True)


@triton.constexpr_function
def _lop3(shift, bits, dtype):
    """`(words >> shift & mask) | exponent` for the two codes of a register: one shift and one LOP3 (NVIDIA)."""
    exponent = "0x43004300" if dtype == tl.bfloat16 else "0x64006400"
    mask = "0x000f000f" if bits == 4 else "0x00030003"
    return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t, {mask}, {exponent}, 0xea; }}"


@triton.jit
def decode(words, high, PLANE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """One plane of codes as floats, exactly.

    Args:
        words: int16, `16 / BITS` codes each, unsigned; for 3 bits the lower two of each code; for 8 bits int8, signed.
        high: the third bits of 3-bit codes, int16, that of plane 0 in its place.

    Returns:
        `code + 2**7` in bfloat16 and `code + 2**10` in float16, since an integer in the lowest bits of such a float
        needs no conversion; the zero points have the same offset (`swizzles.swizzle_int`). Of 8 bits, the code.
    """
    offset: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    lower: tl.constexpr = 2 if BITS == 3 else BITS
    if BITS == 8:  # no return in front of the others, which would be compiled too
        return rounded(words.to(tl.float32), dtype) if INTERPRET else words.to(dtype)
    elif INTERPRET:
        code = (words.to(tl.int32) >> (lower * PLANE)) & (2**lower - 1)
        if BITS == 3:
            code |= (high.to(tl.int32) >> PLANE) & 4
        return code.to(tl.float32) + offset
    elif ASM and BITS != 3:
        asm: tl.constexpr = _lop3(lower * PLANE, BITS, dtype)
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        code = (words >> (lower * PLANE)) & (2**lower - 1)
        if BITS == 3:
            code |= (high >> PLANE) & 4
        exponent: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        return (code | exponent).to(dtype, bitcast=True)


@triton.constexpr_function
def _e2m1(place):
    """The sign to bit 15 and the other bits to 8, 7 and 6, of the two codes of a register (NVIDIA)."""
    shift = 4 * place - 6
    move = f"shr.u32 t, $1, {shift};" if shift > 0 else f"shl.b32 t, $1, {-shift};"
    sign = f"shl.b32 s, $1, {12 - 4 * place}; and.b32 s, s, 0x80008000;"
    return f"{{ .reg .b32 s, t; {move} {sign} lop3.b32 $0, t, 0x01c001c0, s, 0xea; }}"


@triton.constexpr_function
def _e4m3(half):
    """Two of the four codes of a register, each in the upper byte of 16 bits, then as `_e2m1`."""
    spread = f"prmt.b32 s, $2, 0, {'0x1404' if half == 0 else '0x3424'};"
    return f"{spread} shr.u32 t, s, 4; and.b32 s, s, 0x80008000; lop3.b32 ${half}, t, 0x07f007f0, s, 0xea;"


@triton.jit
def decode_floats(words, PLACE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """One plane of floats, E2M1 of 4 bits or E4M3 of 8, as bfloat16 of too small an exponent.

    Their bits are taken for those of a wider exponent, which is 2**126 or 2**120 times too small: scales make that good
    (`swizzles.swizzle_floats`).

    Args:
        words: int16, four codes each, of which PLACE is taken; or int8, one.
    """
    if INTERPRET:
        wide = words.to(tl.int32) >> (4 * PLACE if BITS == 4 else 0)
        if BITS == 4:
            return ((wide & 7) << 22 | (wide & 8) << 28).to(tl.float32, bitcast=True)
        return ((wide & 127) << 20 | (wide & 128) << 24).to(tl.float32, bitcast=True)
    elif BITS == 4:
        if ASM:
            asm: tl.constexpr = _e2m1(PLACE)
            return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            moved = words << (6 - 4 * PLACE) if PLACE < 2 else words >> (4 * PLACE - 6)
            return raw(moved & 0x01C0 | (words << (12 - 4 * PLACE)) & -0x8000)
    elif ASM:
        both: tl.constexpr = "{ .reg .b32 s, t; " + _e4m3(0) + _e4m3(1) + " }"
        return tl.inline_asm_elementwise(both, "=r,=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        wide = words.to(tl.int16)  # the sign fills the upper byte
        return raw((wide << 4) & 0x07F0 | wide & -0x8000)


@triton.jit
def share(tiles):
    """The tiles of this program among those that split the columns."""
    per = tl.cdiv(tiles, tl.num_programs(2))
    first = tl.program_id(2) * per
    return first, tl.minimum(first + per, tiles)


@triton.jit
def store_part(acc, OUT, rn, rm, M, N):
    """A part of a split product, for `reduce_kernel`."""
    place = tl.program_id(2).to(tl.int64) * M * N + rm[None, :].to(tl.int64) * N + rn[:, None]
    tl.store(OUT + place, acc, mask=(rn < N)[:, None] & (rm < M)[None, :])


@triton.jit
def finish(
    acc, rn, rm, OUT, A, ASCALE, BIAS, UP, DOWN, M, N, RANK,
    BLOCK: tl.constexpr, A_CODES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What follows the products: `A acc + bias + up (down x)`, stored as `[M, N]`.

    Args:
        acc: float32 `[BN, BM]` of rows rn and tokens rm.
        A: `[N, BLOCK]`, diagonal blocks one below the other, or int8 with ASCALE `[N]`.
        UP: `[N, RANK]`; DOWN: `[M, RANK]`, what the residual's lower factor made of the inputs.
    """
    dtype: tl.constexpr = OUT.dtype.element_ty
    row, token = (rn < N)[:, None], (rm < M)[None, :]
    if BLOCK > 0:
        inner = tl.arange(0, BN)
        same = (inner[:, None] // BLOCK == inner[None, :] // BLOCK) & row
        blocks = tl.load(A + rn[:, None] * BLOCK + (inner % BLOCK)[None, :], mask=same, other=0)
        blocks = blocks.to(tl.float32) if INTERPRET else blocks.to(dtype)
        acc = dot(blocks, rounded(acc, dtype), tl.zeros((BN, BM), tl.float32))
        if A_CODES:
            acc *= tl.load(ASCALE + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        for start in range(0, RANK, 16):
            part = start + tl.arange(0, 16)
            up = tl.load(UP + rn[:, None] * RANK + part[None, :], mask=row & (part < RANK)[None, :], other=0.0)
            down = tl.load(DOWN + rm[None, :] * RANK + part[:, None], mask=token & (part < RANK)[:, None], other=0.0)
            acc = dot(up, down, acc)
    if HAS_BIAS:
        acc += tl.load(BIAS + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    place = OUT + rm[None, :].to(tl.int64) * N + rn[:, None]
    tl.store(place, acc.to(dtype), mask=row & token)


@triton.jit
def reduce_kernel(
    PARTS, OUT, A, ASCALE, BIAS, UP, DOWN, M, N, RANK, SPLITS,
    BLOCK: tl.constexpr, A_CODES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The second half of a split GEMM: parts float32 `[SPLITS, M, N]`, summed in order, and `finish`."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (rn < N)[:, None] & (rm < M)[None, :]
    place = rm[None, :].to(tl.int64) * N + rn[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for split in range(0, SPLITS):
        acc += tl.load(PARTS + tl.cast(split, tl.int64) * M * N + place, mask=mask, other=0.0)
    finish(
        acc, rn, rm, OUT, A, ASCALE, BIAS, UP, DOWN, M, N, RANK, BLOCK, A_CODES, HAS_BIAS, HAS_RESIDUAL, BM, BN
    )  # fmt: skip
