"""The GPU kernels as operators of torch, so that compiled models and CUDA graphs keep them as they are.

An operator checks nothing that its caller, `runtime/`, has made sure of at load: shapes fit, tensors are contiguous
and on one device. Triton is imported by the first call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch, layouts, reference, swizzles

DEVICES = ("cpu", "cuda")  # of the CPU only under Triton's interpreter
EXPAND_BYTES = 1 << 26  # of a decoded part of a weight


def _implementation(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Has an operator run by a function, on the device of its first argument, which need not be the current one."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *others: Any) -> Tensor:
            with torch.cuda.device_of(x):
                return function(x, *others)

        torch.library.impl(f"compressor::{name}", DEVICES)(run)
        return function

    return register


def _kernels(name: str) -> Any:
    import importlib

    return importlib.import_module(f".triton.{name}", __package__)


def _finish_arguments(
    out: Tensor, a: Tensor | None, a_scales: Tensor | None, bias: Tensor | None, up: Tensor | None, down: Tensor | None
) -> dict[str, Any]:
    """Arguments of `common.finish` by name; what is absent has any pointer."""
    rank = 0 if up is None else up.shape[1]
    pointers = {"BIAS": bias, "UP": up, "DOWN": down, "A": a, "ASCALE": a_scales}
    return {
        **{name: out if tensor is None else tensor for name, tensor in pointers.items()},
        "M": out.shape[0], "N": out.shape[1], "RANK": rank, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": rank > 0,
        "BLOCK": 0 if a is None else a.shape[1], "A_CODES": a_scales is not None,
    }  # fmt: skip


def _reduce(parts: Tensor, out: Tensor, finish: dict[str, Any], rows: int) -> None:
    """Parts `[splits, tokens, rows]` → `out`, by programs of `rows` rows."""
    tokens = min(16, _power(out.shape[0]))
    grid = (math.ceil(out.shape[1] / rows), math.ceil(out.shape[0] / tokens))
    _kernels("common").reduce_kernel[grid](
        PARTS=parts, OUT=out, SPLITS=len(parts), BM=max(tokens, 8), BN=rows, num_warps=4, **finish
    )


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _power(count: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (count - 1).bit_length()


torch.library.define(
    "compressor::group_linear",
    "(Tensor x, Tensor words, Tensor? high, Tensor pairs, int rows, int bits, int group_size, bool floats, "
    "int shift, Tensor? bias=None, Tensor? up=None, Tensor? down=None) -> Tensor",
)


@_implementation("group_linear")
def _group_linear(
    x: Tensor, words: Tensor, high: Tensor | None, pairs: Tensor, rows: int, bits: int, group_size: int, floats: bool,
    shift: int, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    flat, down = (None if part is None else _flat(part) for part in (x, down))
    assert flat is not None
    tokens, columns = flat.shape
    gpu = dispatch.gpu_capability(x.device)
    shape = rows, columns, f"{'float' if floats else 'int'}{bits}", group_size, swizzles.TILE
    launch = dispatch.linear_launch("group_linear", tokens, *shape, x.dtype, gpu)
    weight = swizzles.GroupWords(words, high, pairs, bits, group_size, floats, shift)
    out = run_group_linear(launch, flat, weight, rows, bias, up, down)
    return out.view(*x.shape[:-1], rows)


@torch.library.register_fake("compressor::group_linear")
def _(x: Tensor, words: Tensor, high: Any, pairs: Tensor, rows: int, *others: Any, **more: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def run_group_linear(
    launch: dispatch.Launch, x: Tensor, weight: swizzles.GroupWords, rows: int, bias: Tensor | None = None,
    up: Tensor | None = None, down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`x Wᵀ + bias + down upᵀ` as `launch` says.

    Args:
        x: `[tokens, columns]`, bfloat16 or float16.
        rows: of the weight, without its padding.
        bias: `[rows]`; up: `[rows, rank]`; down: `[tokens, rank]`; each may be missing.
    """
    kernels = _kernels("group_linear")
    (tokens, columns), tile = x.shape, launch.tile
    common = {
        "WORDS": weight.words, "HIGH": weight.words if weight.high is None else weight.high, "PAIRS": weight.pairs,
        "NP": weight.words.shape[1], "K": columns, "BITS": weight.bits, "FLOATS": weight.floats,
        "GROUP": weight.group_size, "ASM": dispatch.gpu_capability(x.device).assembly, "num_warps": tile.warps,
    }  # fmt: skip
    if launch.kernel == "expand":

        def decoded(first: int, part: Tensor) -> None:
            grid = (math.ceil(len(part) / 64), math.ceil(columns / swizzles.TILE))
            own = {"first_row": first, "N": first + len(part), "SHIFT": weight.shift}
            kernels.expand_kernel[grid](OUT=part, BN=64, **own, **common)

        return _expanded(x, rows, columns, decoded, bias, up, down)
    common["EVEN"] = columns % swizzles.TILE == 0
    out = x.new_empty(tokens, rows)
    finish = _finish_arguments(out, None, None, bias, up, down)
    split = launch.kernel == "gemv" or launch.splits > 1
    target = torch.empty(launch.splits, tokens, rows, dtype=torch.float32, device=x.device) if split else out
    if launch.kernel == "gemv":
        grid = (math.ceil(rows / tile.rows), 1, launch.splits)
        kernels.gemv_kernel[grid](X=x, OUT=target, N=rows, STAGES=tile.stages, BN=tile.rows, **common)
    else:
        grid = (math.ceil(rows / tile.rows), math.ceil(tokens / tile.tokens), launch.splits)
        own = {key: value for key, value in finish.items() if key not in ("A", "ASCALE", "BLOCK", "A_CODES")}
        kernels.gemm_kernel[grid](
            X=x, OUT=target, SHIFT=weight.shift, SPLIT=split, BM=tile.tokens, BN=tile.rows, num_stages=tile.stages,
            **common, **own,
        )  # fmt: skip
    if split:
        _reduce(target, out, finish, 64)
    return out


def _expanded(
    x: Tensor, rows: int, columns: int, decoded: Any, bias: Tensor | None, up: Tensor | None, down: Tensor | None
) -> Tensor:
    """A dense product over parts of a weight that `decoded(first row, part)` fills."""
    step = min(rows, max(swizzles.TILE, EXPAND_BYTES // (columns * x.element_size()) // swizzles.TILE * swizzles.TILE))
    room = x.new_empty(step, columns)
    if step == rows:
        decoded(0, room)
        out = F.linear(x, room, bias)
    else:
        out = x.new_empty(len(x), rows)
        for first in range(0, rows, step):
            part = room[: min(step, rows - first)]
            decoded(first, part)
            out[:, first : first + len(part)] = x @ part.T
        if bias is not None:
            out += bias
    if up is not None:
        assert down is not None
        out.addmm_(down, up.T)
    return out


torch.library.define(
    "compressor::sparse_linear",
    "(Tensor x, Tensor values, Tensor kept, Tensor pairs, int rows, int bits, int group_size, int width, "
    "Tensor? b=None, Tensor? b_scales=None, Tensor? a=None, Tensor? a_scales=None, Tensor? bias=None, "
    "Tensor? up=None, Tensor? down=None) -> Tensor",
)


@_implementation("sparse_linear")
def _sparse_linear(
    x: Tensor, values: Tensor, kept: Tensor, pairs: Tensor, rows: int, bits: int, group_size: int, width: int,
    b: Tensor | None = None, b_scales: Tensor | None = None, a: Tensor | None = None, a_scales: Tensor | None = None,
    bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    flat, down = (None if part is None else _flat(part) for part in (x, down))
    assert flat is not None
    tokens, columns = flat.shape
    launch = dispatch.linear_launch(
        "sparse_linear" if a is None else "armor_linear", tokens, rows, columns, f"int{bits}", group_size, 16 * width,
        x.dtype, dispatch.gpu_capability(x.device),
    )  # fmt: skip
    weight = swizzles.SparseWords(values, kept, pairs, bits, group_size, width)
    planes = four_planes(flat, b, b_scales)
    out = run_sparse_linear(launch, planes, weight, rows, a, a_scales, bias, up, down)
    return out.view(*x.shape[:-1], rows)


@torch.library.register_fake("compressor::sparse_linear")
def _(x: Tensor, values: Tensor, kept: Tensor, pairs: Tensor, rows: int, *others: Any, **more: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def four_planes(x: Tensor, b: Tensor | None, b_scales: Tensor | None) -> Tensor:
    """`B x` for each of `[tokens, columns]`, as `[4, tokens, columns / 4]`: plane p has columns p, p + 4, p + 8, ...

    Args:
        b: `[columns, block]`, diagonal blocks one below the other, or int8 with b_scales `[columns]`; None for B = 1.
    """
    tokens, columns = x.shape
    if b is None:
        return x.view(tokens, columns // 4, 4).permute(2, 0, 1).contiguous()
    planes, block = x.new_empty(4, tokens, columns // 4), b.shape[1]
    batch = min(64, max(8, _power(tokens)))
    _kernels("sparse24").scatter_kernel[(columns // block, math.ceil(tokens / batch))](
        X=x, PLANES=planes, B=b, BSCALE=planes if b_scales is None else b_scales, M=tokens, K=columns, BLOCK=block,
        CODES=b_scales is not None, BM=batch, num_warps=4,
    )  # fmt: skip
    return planes


def run_sparse_linear(
    launch: dispatch.Launch, planes: Tensor, weight: swizzles.SparseWords, rows: int, a: Tensor | None = None,
    a_scales: Tensor | None = None, bias: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`A W x + bias + up down` as `launch` says.

    Args:
        planes: x as `four_planes` gives it.
        rows: of the weight, without its padding.
        a: `[rows, block]`, or int8 with a_scales `[rows]`.
        others: as `run_group_linear` takes them.
    """
    kernels, tile = _kernels("sparse24"), launch.tile
    tokens, columns = planes.shape[1], 4 * planes.shape[2]
    depth = 16 * weight.width
    common = {
        "VALUES": weight.values, "KEPT": weight.kept, "PAIRS": weight.pairs, "NP": weight.kept.shape[1], "K": columns,
        "BITS": weight.bits, "GROUP": weight.group_size, "WIDTH": weight.width,
        "ASM": dispatch.gpu_capability(planes.device).assembly, "num_warps": tile.warps,
    }  # fmt: skip
    if launch.kernel == "expand":

        def decoded(first: int, part: Tensor) -> None:
            grid = (math.ceil(len(part) / 64), math.ceil(columns / depth))
            kernels.expand_kernel[grid](OUT=part, first_row=first, N=first + len(part), BN=64, **common)

        flat = planes.transpose(0, 1).reshape(tokens, columns)
        if a is None:
            return _expanded(flat, rows, columns, decoded, bias, up, down)
        product = _expanded(flat, rows, columns, decoded, None, None, None)
        out = planes.new_empty(tokens, rows)
        return _finish_dense(product, out, a, a_scales, bias, up, down)
    out = planes.new_empty(tokens, rows)
    finish = _finish_arguments(out, a, a_scales, bias, up, down)
    split = launch.splits > 1 or (a is not None and tile.rows % a.shape[1] != 0)
    target = torch.empty(launch.splits, tokens, rows, dtype=torch.float32, device=planes.device) if split else out
    own = {**finish, "BLOCK": 0, "A_CODES": False} if split else finish
    grid = (math.ceil(rows / tile.rows), math.ceil(tokens / tile.tokens), launch.splits)
    kernels.gemm_kernel[grid](
        PLANES=planes, OUT=target, SPLIT=split, EVEN=columns % depth == 0, BM=tile.tokens, BN=tile.rows,
        num_stages=tile.stages, **common, **own,
    )  # fmt: skip
    if split:
        _reduce(target, out, finish, 64 if a is None else max(64, a.shape[1]))
    return out


def _finish_dense(product: Tensor, out: Tensor, a: Tensor, *others: Tensor | None) -> Tensor:
    """What follows a dense product: A, bias and residual."""
    a_scales, bias, up, down = others
    _reduce(product.float()[None], out, _finish_arguments(out, a, a_scales, bias, up, down), max(64, a.shape[1]))
    return out


torch.library.define(
    "compressor::latent_attention",
    "(Tensor queries, Tensor keys, Tensor values, Tensor up, Tensor cosines, Tensor sines, Tensor starts, Tensor ends, "
    "float scale, int key_groups, int value_groups, int value_rank, Tensor? bias=None, Tensor? norm=None, "
    "float epsilon=0.0, Tensor? mask=None, Tensor? pages=None) -> Tensor",
)


@_implementation("latent_attention")
def _latent_attention(
    queries: Tensor, keys: Tensor, values: Tensor, up: Tensor, cosines: Tensor, sines: Tensor, starts: Tensor,
    ends: Tensor, scale: float, key_groups: int, value_groups: int, value_rank: int, bias: Tensor | None = None,
    norm: Tensor | None = None, epsilon: float = 0.0, mask: Tensor | None = None, pages: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One new token of each sequence over a cache of latents (`triton/latent_attention.py`).

    Args:
        queries: `[batch, kv_heads, queries, head_dim]`, rotated, channels in the order of `swizzles.pair_order`.
        keys, values: `[batch, tokens, rank]` in the dtype of the queries, or uint8 of `layouts.pack_latents` in 8 bits;
            with pages `[count, page, rank]`.
        up: `[kv_heads, rank / key_groups, head_dim]`; bias: `[kv_heads, head_dim]`; norm: `[head_dim]`; channels alike.
        cosines, sines: `[positions, head_dim / 2]`.
        starts, ends: int32 `[batch]`, of the tokens that are seen; mask: bool `[batch or 1, tokens]`, which of these.
        key_groups, value_groups: of heads that have latents of their own.
        pages: int32 `[batch, pages of a sequence]`.

    Returns:
        `[batch, kv_heads, queries, value_rank / value_groups]`, the weighted means of the values' latents.
    """
    kernels = _kernels("latent_attention")
    batch, heads, count, head_dim = queries.shape
    key_width, value_width = up.shape[1], value_rank // value_groups
    codes = [part.dtype == torch.uint8 for part in (keys, values)]
    page = 0 if pages is None else keys.shape[1]
    tokens = keys.shape[1] if pages is None else page * pages.shape[1]
    gpu = dispatch.gpu_capability(queries.device)
    launch = dispatch.attention_launch(head_dim, count, key_width, value_width, any(codes), queries.dtype, gpu)
    splits, tile = dispatch.attention_splits(batch * heads, tokens, launch, gpu), launch.tile
    parts = torch.empty(batch, heads, splits, count, value_width, dtype=torch.float32, device=queries.device)
    totals = torch.empty(batch, heads, splits, count, dtype=torch.float32, device=queries.device)
    wide = max(_power(value_width), layouts.LATENT_SPLIT)
    seen = starts if mask is None else mask
    kernels.decode_kernel[(batch, heads, splits)](
        queries, *(part.view(torch.int8) if coded else part for part, coded in zip((keys, values), codes, strict=True)),
        *(part.view(torch.half) if coded else part for part, coded in zip((keys, values), codes, strict=True)),
        up, up if bias is None else bias, up if norm is None else norm, cosines, sines, starts, ends,
        seen, starts if pages is None else pages, parts, totals, heads, tokens, keys.stride(-2), values.stride(-2),
        0 if mask is None or len(mask) == 1 else mask.stride(0), 0 if pages is None else pages.shape[1], scale, epsilon,
        QUERIES=count, KEY_HEADS=heads // key_groups, VALUE_HEADS=heads // value_groups, HALF=head_dim // 2,
        KEY_RANK=key_width * key_groups, KEY_WIDTH=key_width, VALUE_RANK=value_rank, VALUE_WIDTH=value_width,
        KEY_CODES=codes[0], VALUE_CODES=codes[1], HAS_BIAS=bias is not None, HAS_NORM=norm is not None,
        HAS_MASK=mask is not None, PAGE=page, BQ=max(16, _power(count)), BT=tile.tokens, BR=tile.rows, BV=wide,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    out = queries.new_empty(batch, heads, count, value_width)
    block = min(wide, 128)
    kernels.combine_kernel[(batch * heads, count, math.ceil(value_width / block))](
        parts, totals, out, splits, QUERIES=count, VALUE_WIDTH=value_width, BS=_power(splits), BV=block, num_warps=4
    )
    return out


@torch.library.register_fake("compressor::latent_attention")
def _(
    queries: Tensor, keys: Tensor, values: Tensor, up: Tensor, cosines: Tensor, sines: Tensor, starts: Tensor,
    ends: Tensor, scale: float, key_groups: int, value_groups: int, value_rank: int, *others: Any, **more: Any,
) -> Tensor:  # fmt: skip
    return queries.new_empty(*queries.shape[:3], value_rank // value_groups)


torch.library.define(
    "compressor::int_experts",
    "(Tensor x, Tensor index, Tensor coefficients, Tensor gate_words, Tensor? gate_high, Tensor gate_pairs, "
    "Tensor down_words, Tensor? down_high, Tensor down_pairs, int intermediate_size, int[] bits, int[] group_sizes) "
    "-> Tensor",
)


@_implementation("int_experts")
def _int_experts(
    x: Tensor, index: Tensor, coefficients: Tensor, gate_words: Tensor, gate_high: Tensor | None, gate_pairs: Tensor,
    down_words: Tensor, down_high: Tensor | None, down_pairs: Tensor, intermediate_size: int, bits: list[int],
    group_sizes: list[int],
) -> Tensor:  # fmt: skip
    """A mixture of gated MLPs with SiLU and group-quantized weights (`triton/grouped.py`).

    Args:
        x: `[tokens, hidden_size]`; index, coefficients: `[tokens, top_k]`.
        gate_words, ...: of all experts, `[experts, ...]` as `swizzles.GroupWords` has them, the padded rows of gate in
            front of those of up.
        bits, group_sizes: of gate and up, and of down.

    Returns:
        `[tokens, hidden_size]`.
    """
    kernels = _kernels("grouped")
    (tokens, columns), (_, top_k), experts = x.shape, index.shape, len(gate_words)
    gpu = dispatch.gpu_capability(x.device)
    tile = dispatch.experts_tile(
        tokens * top_k // experts, intermediate_size, columns, f"int{bits[0]}", group_sizes[0], x.dtype, gpu
    )
    slots, owners = sorted_slots(index, experts, tile.tokens)
    inner = x.new_empty(tokens * top_k, intermediate_size)
    outer = x.new_empty(tokens * top_k, columns)
    common = {
        "SLOTS": slots, "OWNERS": owners, "pairs_count": tokens * top_k, "ASM": gpu.assembly, "BM": tile.tokens,
        "BN": tile.rows, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    first = _stacked(gate_words, gate_high, gate_pairs, columns, bits[0], group_sizes[0])
    rows = gate_words.shape[2] // 2
    kernels.gate_up_kernel[(math.ceil(intermediate_size / tile.rows), len(owners))](
        X=x, OUT=inner, top_k=top_k, N=intermediate_size, NP=rows, **common, **first
    )
    second = _stacked(down_words, down_high, down_pairs, intermediate_size, bits[1], group_sizes[1])
    kernels.down_kernel[(math.ceil(columns / tile.rows), len(owners))](
        X=inner, OUT=outer, COEFFICIENTS=coefficients, N=columns, NP=down_words.shape[2], **common, **second
    )
    return outer.view(tokens, top_k, columns).sum(1)


@torch.library.register_fake("compressor::int_experts")
def _(x: Tensor, *others: Any, **more: Any) -> Tensor:
    return torch.empty_like(x)


def _stacked(
    words: Tensor, high: Tensor | None, pairs: Tensor, columns: int, bits: int, group_size: int
) -> dict[str, Any]:
    return {
        "WORDS": words, "HIGH": words if high is None else high, "PAIRS": pairs, "K": columns, "BITS": bits,
        "GROUP": group_size, "EVEN": columns % swizzles.TILE == 0, "words_stride": words.stride(0),
        "high_stride": 0 if high is None else high.stride(0), "pairs_stride": pairs.stride(0),
    }  # fmt: skip


def sorted_slots(index: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Pairs of token and choice, sorted by expert in blocks of one expert each, without waiting for the device.

    Args:
        index: `[tokens, top_k]`, experts' numbers.
        block: slots of a block.

    Returns:
        slots int32 `[blocks * block]`, numbers of pairs, or that of pairs there are where a block has room left; owners
        int32 `[blocks]`, the expert of each, -1 behind the last.
    """
    flat = index.reshape(-1)
    pairs = flat.numel()
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=index.device).scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (counts + block - 1) // block
    last = blocks.cumsum(0)
    starts = (last - blocks) * block - (counts.cumsum(0) - counts)  # what an expert's pairs move by
    most = min(pairs, experts + pairs // block)
    slots = torch.full((most * block,), pairs, dtype=torch.int32, device=index.device)
    places = torch.arange(pairs, device=index.device) + starts[flat[order]]
    slots.scatter_(0, places, order.to(torch.int32))
    numbers = torch.arange(most, device=index.device)
    owners = torch.searchsorted(last, numbers, right=True)
    return slots, torch.where(numbers < last[-1], owners, -1).to(torch.int32)


torch.library.define(
    "compressor::quantized_rows_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? bias=None, Tensor? input_scale=None) -> Tensor",
)


@_implementation("quantized_rows_linear")
def _quantized_rows_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """A product of 8-bit numbers: activations are scaled by token, or all alike, weights by row.

    Args:
        x: `[..., columns]`; codes: int8 or fp8 `[rows, columns]`; scales: float32 `[rows]`; bias: `[rows]`;
            input_scale: float32 `[1]`.
    """
    kernels = _kernels("w8a8")
    flat = _flat(x)
    tokens, columns = flat.shape
    rows, whole = len(codes), codes.dtype == torch.int8
    padded = max(32, -(-tokens // 8) * 8) if whole else -(-tokens // 16) * 16  # what the products want
    inputs = torch.empty(padded, columns, dtype=codes.dtype, device=x.device)
    factors = torch.empty(padded, dtype=torch.float32, device=x.device)
    inputs[tokens:].zero_()
    factors[tokens:].zero_()
    if input_scale is None:
        largest = 127.0 if whole else torch.finfo(codes.dtype).max
        kernels.quantize_kernel[(tokens,)](flat, inputs, factors, columns, LARGEST=largest, BK=1024, num_warps=4)
    else:
        inputs[:tokens], factors[:tokens] = reference.quantize_rows(flat, codes.dtype, input_scale)
    if whole:
        sums, out = torch._int_mm(inputs, codes.T), x.new_empty(tokens, rows)
        kernels.rescale_kernel[(tokens, math.ceil(rows / 1024))](
            sums, out, factors, scales, out if bias is None else bias, rows, HAS_BIAS=bias is not None, BN=1024,
            num_warps=4,
        )  # fmt: skip
    else:
        out = torch._scaled_mm(inputs, codes.T, factors[:, None], scales[None], bias, out_dtype=x.dtype)[:tokens]
    return out.view(*x.shape[:-1], rows)


@torch.library.register_fake("compressor::quantized_rows_linear")
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Any = None, input_scale: Any = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(codes))


# What the runtime calls: through torch's dispatcher, so that compiled graphs keep them whole.
group_linear = torch.ops.compressor.group_linear
sparse_linear = torch.ops.compressor.sparse_linear
latent_attention = torch.ops.compressor.latent_attention
int_experts = torch.ops.compressor.int_experts
quantized_rows_linear = torch.ops.compressor.quantized_rows_linear
