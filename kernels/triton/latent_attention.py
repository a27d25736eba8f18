"""Attention of one new token for each sequence over a KV cache that holds latents.

A program serves all queries of a key-value head over a span of tokens: it makes keys from latents a tile at a time,
adds the bias, norms and rotates them, and sums the values' latents by the softmax's weights. Spans are put together by
their log-sum-exp. Of a head's channels the first ones of the rotary pairs come first (`swizzles.pair_order`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, rounded

SPLIT = tl.constexpr(32)  # `layouts.LATENT_SPLIT`


@triton.jit
def load_latents(
    CACHE, SCALES, row, stride, first, seen, COUNT: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
    CODES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """COUNT channels from `first` on, zeros beyond WIDTH, of the latents at `row` of the cache: `[tokens, COUNT]`.

    Behind RANK int8 codes of a row lie the fp16 scales of 32 channels each; SCALES is the same memory as fp16.
    """
    inner = tl.arange(0, COUNT)
    mask = seen[:, None] & (inner < WIDTH)[None, :]
    latents = tl.load(CACHE + (row * stride)[:, None] + (first + inner)[None, :], mask=mask, other=0)
    if CODES:
        part = tl.arange(0, COUNT // SPLIT)
        place = (row * (stride // 2))[:, None] + (RANK // 2 + first // SPLIT + part)[None, :]
        scales = tl.load(SCALES + place, mask=seen[:, None] & (part * SPLIT < WIDTH)[None, :], other=0.0)
        spread = tl.broadcast_to(scales[:, :, None], (scales.shape[0], COUNT // SPLIT, SPLIT))
        latents = rounded(latents.to(tl.float32) * tl.reshape(spread, latents.shape).to(tl.float32), dtype)
    return latents


@triton.jit
def load_up(UP, head, first, BR: tl.constexpr, KEY_WIDTH: tl.constexpr, HALF: tl.constexpr):
    """BR rows of what makes a head's keys, `[BR, HALF]` for each half of the channels."""
    part, half = first + tl.arange(0, BR), tl.arange(0, HALF)
    place = UP + (head * KEY_WIDTH + part)[:, None] * (2 * HALF) + half[None, :]
    mask = (part < KEY_WIDTH)[:, None]
    return tl.load(place, mask=mask, other=0.0), tl.load(place + HALF, mask=mask, other=0.0)


@triton.jit
def decode_kernel(
    Q, KEYS, VALUES, KEY_SCALES, VALUE_SCALES, UP, BIAS, NORM, COS, SIN, STARTS, ENDS, MASK, PAGES, OUT, TOTALS,
    heads, tokens, key_stride, value_stride, mask_stride, page_row, scale, epsilon,
    QUERIES: tl.constexpr, KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, HALF: tl.constexpr,
    KEY_RANK: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_RANK: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    KEY_CODES: tl.constexpr, VALUE_CODES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr, PAGE: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Sums of one span of tokens.

    Args:
        Q: `[batch, heads, QUERIES, 2 HALF]`, rotated, its channels in halves.
        KEYS, VALUES: `[batch, tokens, stride]` latents or int8 codes with their scales behind (`layouts.pack_latents`);
            with PAGE `[pages, PAGE, stride]`. KEY_SCALES, VALUE_SCALES: the same as fp16.
        UP: `[heads, KEY_WIDTH, 2 HALF]`. BIAS: `[heads, 2 HALF]`. NORM: `[2 HALF]`.
        COS, SIN: `[positions, HALF]`.
        STARTS, ENDS: int32 `[batch]`, the first token that is seen and the one behind the last.
        MASK: bool `[batch, tokens]`, which of these are seen, rows `mask_stride` apart.
        PAGES: int32 `[batch, page_row]`, where each page of a sequence lies.
        OUT: float32 `[batch, heads, splits, QUERIES, VALUE_WIDTH]`, weighted means.
        TOTALS: float32 `[batch, heads, splits, QUERIES]`, their log2-sum-exp2.
        KEY_HEADS, VALUE_HEADS: heads that share latents; KEY_RANK, VALUE_RANK: numbers cached for a token, of which
            KEY_WIDTH, VALUE_WIDTH are those of a head's group.
    """
    batch, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = Q.dtype.element_ty
    begin, end = tl.load(STARTS + batch), tl.load(ENDS + batch)
    per = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), BT) * BT
    begin += split * per
    end = tl.minimum(begin + per, end)
    query, half, value = tl.arange(0, BQ), tl.arange(0, HALF), tl.arange(0, BV)
    line = (batch * heads + head).to(tl.int64)
    place = Q + (line * QUERIES + query)[:, None] * (2 * HALF) + half[None, :]
    q0 = tl.load(place, mask=(query < QUERIES)[:, None], other=0.0)
    q1 = tl.load(place + HALF, mask=(query < QUERIES)[:, None], other=0.0)
    most = tl.full((BQ,), -1e30, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, BV), tl.float32)
    up0, up1 = load_up(UP, head, 0, BR, KEY_WIDTH, HALF)
    for start in tl.range(begin, end, BT):
        token = start + tl.arange(0, BT)
        seen = token < end
        if PAGE > 0:
            page = tl.load(PAGES + batch * page_row + token // PAGE, mask=seen, other=0)
            row = page.to(tl.int64) * PAGE + token % PAGE
        else:
            row = batch.to(tl.int64) * tokens + token
        k0, k1 = tl.zeros((BT, HALF), tl.float32), tl.zeros((BT, HALF), tl.float32)
        for first in tl.static_range(0, KEY_WIDTH, BR):
            if first > 0 or KEY_WIDTH > BR:
                up0, up1 = load_up(UP, head, first, BR, KEY_WIDTH, HALF)
            latents = load_latents(
                KEYS, KEY_SCALES, row, key_stride, head // KEY_HEADS * KEY_WIDTH + first, seen, BR, KEY_WIDTH - first,
                KEY_RANK, KEY_CODES, dtype,
            )  # fmt: skip
            k0, k1 = dot(latents, up0, k0), dot(latents, up1, k1)
        if HAS_BIAS:
            k0 += tl.load(BIAS + head * 2 * HALF + half).to(tl.float32)[None, :]
            k1 += tl.load(BIAS + head * 2 * HALF + HALF + half).to(tl.float32)[None, :]
        if HAS_NORM:
            factor = 1 / tl.sqrt((tl.sum(k0 * k0, 1) + tl.sum(k1 * k1, 1)) / (2 * HALF) + epsilon)
            k0 *= factor[:, None] * tl.load(NORM + half).to(tl.float32)[None, :]
            k1 *= factor[:, None] * tl.load(NORM + HALF + half).to(tl.float32)[None, :]
        turn = token[:, None] * HALF + half[None, :]
        cosine = tl.load(COS + turn, mask=seen[:, None], other=0.0).to(tl.float32)
        sine = tl.load(SIN + turn, mask=seen[:, None], other=0.0).to(tl.float32)
        r0, r1 = rounded(k0 * cosine - k1 * sine, dtype), rounded(k1 * cosine + k0 * sine, dtype)
        scores = dot(q0, tl.trans(r0), tl.zeros((BQ, BT), tl.float32))
        scores = dot(q1, tl.trans(r1), scores)
        if HAS_MASK:
            seen &= tl.load(MASK + batch * mask_stride + token, mask=seen, other=0) != 0
        scores = tl.where(seen[None, :], scores * (scale * 1.4426950408889634), -1e30)
        new = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - new)
        shares = tl.where(seen[None, :], tl.exp2(scores - new[:, None]), 0.0)
        total, most = total * shrink + tl.sum(shares, 1), new
        latents = load_latents(
            VALUES, VALUE_SCALES, row, value_stride, head // VALUE_HEADS * VALUE_WIDTH, seen, BV, VALUE_WIDTH,
            VALUE_RANK, VALUE_CODES, dtype,
        )  # fmt: skip
        acc = dot(rounded(shares, dtype), latents, acc * shrink[:, None])
    line = (line * tl.num_programs(2) + split) * QUERIES + query
    total = tl.where(total > 0, total, 1.0)  # a span without tokens has the least of weights
    tl.store(TOTALS + line, most + tl.log2(total), mask=query < QUERIES)
    place = OUT + line[:, None] * VALUE_WIDTH + value[None, :]
    tl.store(place, acc / total[:, None], mask=(query < QUERIES)[:, None] & (value < VALUE_WIDTH)[None, :])


@triton.jit
def combine_kernel(
    PARTS, TOTALS, OUT, SPLITS, QUERIES: tl.constexpr, VALUE_WIDTH: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr
):
    """Means of the spans → the mean of all: OUT `[batch * heads, QUERIES, VALUE_WIDTH]`."""
    line, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    value = tl.program_id(2) * BV + tl.arange(0, BV)
    split = tl.arange(0, BS)
    totals = tl.load(TOTALS + (line * SPLITS + split) * QUERIES + query, mask=split < SPLITS, other=-1e30)
    weights = tl.exp2(totals - tl.max(totals, 0))
    weights = tl.where(split < SPLITS, weights, 0.0)
    weights /= tl.sum(weights, 0)
    place = ((line * SPLITS + split) * QUERIES + query)[:, None] * VALUE_WIDTH + value[None, :]
    parts = tl.load(PARTS + place, mask=(split < SPLITS)[:, None] & (value < VALUE_WIDTH)[None, :], other=0.0)
    result = tl.sum(parts * weights[:, None], 0)
    place = OUT + (line * QUERIES + query) * VALUE_WIDTH + value
    tl.store(place, result.to(OUT.dtype.element_ty), mask=value < VALUE_WIDTH)
