"""Plain torch twins: what every kernel computes, written to be read and to be compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .numbers import E4M3, Rounding

_TURNS = 0.875  # of a power of two, from where on a number counts as that, as vLLM and compressed-tensors have it


def expand_groups(per_group: Tensor, columns: int, group_size: int) -> Tensor:
    """Repeat `[rows, groups]` along the columns; the last group may be ragged."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def dequantize_int(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """`(codes - zeros) * scales` per group.

    Args:
        codes: int8 `[rows, columns]`.
        scales: `[rows, groups]`, any sign.
        zeros: int8 `[rows, groups]`, or None when symmetric.
        dtype: of the result; the product is rounded once, from float32 (float64 when asked for).
    """
    columns = codes.shape[1]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = codes.to(exact)
    if zeros is not None:
        values -= expand_groups(zeros, columns, group_size).to(exact)
    values *= expand_groups(scales, columns, group_size).to(exact)
    return values.to(dtype)


def linear_int(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ W.T + bias` with the dequantized weight in x's dtype; x is `[..., columns]`."""
    return F.linear(x, dequantize_int(codes, scales, zeros, group_size, x.dtype), bias)


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """`y = D x` for every row of `[..., n]`, D having `blocks` `[n / b, b, b]` on its diagonal."""
    count, size, _ = blocks.shape
    parts = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(parts, blocks.mT).transpose(0, 1).reshape(x.shape)


def grouped_product(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`[..., groups * r]` → `[..., rows]`: each group of rows of `weight` `[rows, r]` reads its own r numbers."""
    parts = x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)
    product = torch.bmm(parts, weight.view(groups, -1, weight.shape[1]).mT)
    return product.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])


def latent_attention(
    queries: Tensor, keys: Tensor, values: Tensor, up: Tensor, cosines: Tensor, sines: Tensor, scale: float,
    key_groups: int, value_groups: int, bias: Tensor | None = None, norm: Tensor | None = None, epsilon: float = 0.0,
) -> Tensor:  # fmt: skip
    """One new token of one sequence over the latents of what it sees, by the book; arguments as `ops` has them.

    Args:
        queries: `[kv_heads, queries, head_dim]`; keys, values: `[tokens, rank]`.
        cosines, sines: `[tokens, head_dim / 2]`.

    Returns:
        `[kv_heads, queries, value_rank / value_groups]`.
    """
    heads = len(queries)
    made = keys.unflatten(1, (key_groups, -1)).transpose(0, 1).repeat_interleave(heads // key_groups, 0) @ up
    if bias is not None:
        made = made + bias[:, None]
    if norm is not None:
        made = made * torch.rsqrt(made.square().mean(-1, keepdim=True) + epsilon) * norm
    first, second = made.chunk(2, -1)
    made = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)
    shares = (queries @ made.mT * scale).softmax(-1)
    return shares @ values.unflatten(1, (value_groups, -1)).transpose(0, 1).repeat_interleave(heads // value_groups, 0)


def gated_experts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, index: Tensor, coefficients: Tensor) -> Tensor:
    """A mixture of gated MLPs with SiLU.

    Args:
        x: `[tokens, hidden_size]`.
        gate, up: `[experts, intermediate_size, hidden_size]`; down: `[experts, hidden_size, intermediate_size]`.
        index, coefficients: `[tokens, top_k]`, the router's.
    """
    result = torch.zeros_like(x)
    for token, choice in torch.cartesian_prod(torch.arange(len(x)), torch.arange(index.shape[1])).tolist():
        expert = int(index[token, choice])
        inner = F.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])
        result[token] += coefficients[token, choice] * (down[expert] @ inner)
    return result


def quantize_rows(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row of `[rows, columns]` over its largest size: codes in `dtype` (int8, fp8), float32 scales `[rows]`.

    Args:
        scale: float32 `[1]`, of all rows in place of their own; what is too large for it becomes the largest number.
    """
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    if scale is None:
        scales = x.abs().amax(1).float().clamp_min_(1e-12) / largest
        codes = x / scales[:, None]  # in float32
        return (codes.round_() if dtype == torch.int8 else codes).to(dtype), scales
    codes = x / scale
    codes = codes.round_().clamp_(-128, 127) if dtype == torch.int8 else codes.clamp_(-largest, largest)
    return codes.to(dtype), scale.expand(len(x))


def linear_w8a8(x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """`x @ W.T`, x `[..., columns]` rounded as the weight is: codes (int8, fp8) `[rows, columns]`, scales `[rows]`.

    Args:
        input_scale: as of `quantize_rows`.
    """
    inputs, factors = quantize_rows(x.reshape(-1, x.shape[-1]), codes.dtype, input_scale)
    exact = torch.promote_types(x.dtype, torch.float32)
    sums = inputs.to(exact) @ codes.to(exact).T
    return (sums * factors[:, None] * scales).to(x.dtype).view(*x.shape[:-1], len(codes))


def scaled_blocks(
    values: Tensor, scales: Tensor, global_scale: Tensor | None, rounding: Rounding, lead: int = 0
) -> Tensor:
    """Numbers `[rows, columns]` times the scales of their blocks, over a number.

    Args:
        scales: `[blocks of rows, blocks of columns]`, powers of two by their exponents; the last ones
            may be ragged.
        lead: rows of the first block that come before.
    """
    powers = rounding.scales == "e8m0"
    wide = (scales.view(torch.float8_e8m0fnu) if powers else scales).to(values.dtype)
    if global_scale is not None:
        wide = wide / global_scale.to(values.dtype)
    rows, columns = values.shape
    if rounding.rows > 1:
        wide = wide.repeat_interleave(rounding.rows, 0)[lead : lead + rows]
    return values * expand_groups(wide, columns, rounding.span(columns))


def rounded(x: Tensor, rounding: Rounding, global_scale: Tensor | None = None) -> Tensor:
    """`[..., columns]` rounded as it comes, each block of a row over its largest size. Where scales are powers of two,
    that is the power below it over the power below the largest number; sizes from 7/8 of a power on count as that.

    Args:
        global_scale: `[1]`, that scales of 8 bits are over.
    """
    columns = x.shape[-1]
    exact = x.reshape(-1, columns).to(torch.promote_types(x.dtype, torch.float32))
    span = rounding.span(columns)
    blocks = F.pad(exact, (0, -columns % span)).unflatten(1, (-1, span))
    largest, high = blocks.abs().amax(2, keepdim=True), rounding.numbers.high
    if rounding.scales == "e8m0":
        mantissa, exponent = torch.frexp(largest)
        exponents = exponent + (mantissa >= _TURNS).int() - math.frexp(high)[1]
        scales = torch.ldexp(torch.ones_like(largest), exponents.clamp_(-126, 127))
    elif global_scale is not None:
        unit = 1 / global_scale.to(exact.dtype)
        scales = E4M3.nearest(largest / high / unit).clamp_(min=2.0**-9) * unit
    else:
        scales = largest.clamp(min=1e-12) / high
    return (rounding.numbers.nearest(blocks / scales) * scales).flatten(1)[:, :columns].to(x.dtype).view(x.shape)
