"""CPU paths of quantized linears: torch's native int4 kernel, oneDNN's products of bytes, and tile-wise decoding in
front of a GEMM."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from . import dispatch
from .layouts import unpack_codes
from .reference import dequantize_int, quantize_rows

TILE_ROWS = 512  # rows decoded at a time: the tile stays in cache between decoding and the GEMM
TILE_TOKENS = 256  # rounded to bytes at a time, for the same reason
SLOW_SUMS = 256  # tokens times rows, up to which oneDNN multiplies bytes one by one, at a fraction of the speed


def _kept_whole(schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes of a function of inputs `[..., columns]` and a weight `[rows, ...]` an operator that compiled models keep
    as it is. Others call the function itself: the dispatcher can take as long as the product of a small layer.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        torch.library.define(f"compressor::{name}", schema.removeprefix(name))
        torch.library.impl(f"compressor::{name}", "cpu")(function)

        @torch.library.register_fake(f"compressor::{name}")
        def _(x: Tensor, weight: Tensor, *others: object) -> Tensor:
            return x.new_empty(*x.shape[:-1], len(weight))

        operator = getattr(torch.ops.compressor, name)

        @wraps(function)
        def call(x: Tensor, *others: object) -> Tensor:
            result: Tensor = (operator if torch.compiler.is_compiling() else function)(x, *others)
            return result

        return call

    return register


class Int4(NamedTuple):
    """Integers of up to 4 bits as torch's CPU kernel reads them (`pack_int4`).

    Attributes:
        packed: uint8, in an order private to the processor; rows are padded to a multiple of 16.
        pairs: bf16 `[groups, rows, 2]`: a weight is `(code + 8 - 8) * scale + offset`.
        rows: without the padding.
        span: columns that share a scale; padded: how many the kernel has in their place.
        group_size: of the kernel, a part of `padded`.
    """

    packed: Tensor
    pairs: Tensor
    rows: int
    span: int
    padded: int
    group_size: int


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None, span: int) -> Int4:
    """Signed codes of up to 4 bits → the layout of torch's CPU kernel.

    The kernel knows groups of 32, 64, 128 and 256 columns. Wider ones are several of these with one scale, others get
    columns that no input meets.

    Args:
        codes: int8 `[rows, columns]` in [-8, 7].
        scales: `[rows, groups]`; zeros: int8 alike, or None.
        span: columns that share a scale.
    """
    rows, columns = codes.shape
    groups, padded = scales.shape[1], -(-span // 32) * 32
    group_size = next(size for size in (256, 128, 64, 32) if padded % size == 0)
    codes = F.pad(codes, (0, groups * span - columns)).view(rows, groups, span)
    codes = F.pad(codes, (0, padded - span, 0, 0, 0, -rows % 16)).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    offsets = torch.zeros_like(scales) if zeros is None else -zeros * scales.float()
    pairs = torch.stack([scales.to(torch.bfloat16), offsets.to(torch.bfloat16)], -1)
    pairs = F.pad(pairs, (0, 0, 0, 0, 0, -rows % 16)).repeat_interleave(padded // group_size, 1).transpose(0, 1)
    return Int4(packed, pairs.contiguous(), rows, span, padded, group_size)


def linear_int4(x: Tensor, weight: Int4) -> Tensor:
    """bf16 `[..., columns]` → bf16 `[..., rows]`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    columns = len(weight.pairs) * weight.group_size
    if weight.padded != weight.span:
        groups = columns // weight.padded
        flat = F.pad(flat, (0, groups * weight.span - flat.shape[1])).unflatten(1, (groups, weight.span))
        flat = F.pad(flat, (0, weight.padded - weight.span)).flatten(1)
    elif flat.shape[1] != columns:
        flat = F.pad(flat, (0, columns - flat.shape[1]))
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight.packed, weight.group_size, weight.pairs)
    return result[:, : weight.rows].reshape(*x.shape[:-1], weight.rows)


def pack_int8(codes: Tensor) -> Tensor:
    """int8 `[rows, columns]` → the layout of oneDNN's products, private to the processor."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def linear_int8(x: Tensor, packed: Tensor, scales: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """`[..., columns]` → `[..., rows]`: inputs are rounded token by token, sums are exact, padded or not.

    oneDNN gets inputs 128 higher, as bytes without a sign, and 128 to take off: of signed ones it has a product for
    processors with AMX alone, and on others takes them one by one, thousands of times as slow.

    Args:
        packed: of `pack_int8`; scales: float32 `[rows]`; input_scale: as of `quantize_rows`.
    """
    flat, least = x.reshape(-1, x.shape[-1]), SLOW_SUMS // len(scales) + 1
    result, zeros = flat.new_empty(len(flat), len(scales)), torch.zeros_like(scales, dtype=torch.int32)
    for start in range(0, len(flat), TILE_TOKENS):
        part = slice(start, start + TILE_TOKENS)
        inputs, factors = quantize_rows(flat[part], torch.int8, input_scale)
        inputs = inputs.view(torch.uint8).bitwise_xor_(128)
        if len(inputs) < least:
            inputs = F.pad(inputs, (0, 0, 0, least - len(inputs)))
        sums = torch.ops.onednn.qlinear_pointwise(
            inputs, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        result[part] = sums[: len(factors)].mul_(factors[:, None])
    return result.view(*x.shape[:-1], len(scales))


def sums_bytes() -> bool:
    """Whether oneDNN sums products of bytes exactly: without VNNI, which ONEDNN_MAX_CPU_ISA can take away, it clips
    sums of two to 16 bits."""
    cpu = torch.device("cpu")  # whatever new tensors are on, and of, by default
    largest = torch.full((16, 64), 127, dtype=torch.int8, device=cpu)
    inputs, scales = (torch.ones(shape, dtype=torch.float32, device=cpu) for shape in ((1, 64), (16,)))
    found = linear_int8(inputs, pack_int8(largest), scales)
    return bool((found - 127 * 64).abs().max() < 1)


# Codes → their copy in oneDNN's layout, for as long as these codes live. A module cannot hold it: a tensor without
# storage is neither copied, saved nor traced, and another processor has another layout.
_packed_codes = WeakIdKeyDictionary()


@_kept_whole("bytes_linear(Tensor x, Tensor codes, Tensor scales, Tensor? input_scale=None) -> Tensor")
def bytes_linear(x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """`linear_int8` for int8 codes `[rows, columns]`, which the first call packs."""
    packed = _packed_codes.get(codes)
    if packed is None:
        packed = _packed_codes[codes] = pack_int8(codes)
    return linear_int8(x, packed, scales, input_scale)


Scratch = dict[str, Tensor]  # memory to decode into, tile after tile: fresh pages would cost more than the decoding


def _taken(scratch: Scratch | None, name: str, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers of the scratch, or of its own memory."""
    if scratch is None:
        return torch.empty(count, dtype=dtype)
    if name not in scratch or len(scratch[name]) < count:
        scratch[name] = torch.empty(count, dtype=dtype)
    return scratch[name][:count]


def decode_packed(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int, group_size: int, dtype: torch.dtype,
    scratch: Scratch | None = None,
) -> Tensor:  # fmt: skip
    """Words of the packed layout → weight `[rows, columns]` in `dtype`, rounded once.

    Args:
        packed: int32 `[rows, words]`; scales `[rows, groups]`; zeros int8 alike or None.
        scratch: what the result may lie in.
    """
    # A code less its zero point, and a bf16 scale, are exact in bf16: the product is rounded once without float32.
    # The tables, and the scratch memory, are of the CPU.
    whole = columns % 32 == columns % group_size == 0 and packed.device.type == "cpu"
    quick = whole and bits in (2, 3, 4, 8) and dtype == scales.dtype == torch.bfloat16
    if not quick:
        return dequantize_int(unpack_codes(packed, bits, columns), scales, zeros, group_size, dtype)
    rows, packed = packed.shape[0], packed.contiguous()
    if bits == 8:
        weight = (packed.view(torch.uint8) ^ 128).view(torch.int8).to(dtype)
    else:
        count = rows * columns // 4
        places = _taken(scratch, "places", count if bits == 3 else 2 * packed.numel(), torch.int32)
        if bits == 3:  # three bytes are two words of 12 bits
            first, middle, last = packed.view(torch.uint8).view(-1, 3).to(torch.int32).unbind(1)
            places.view(-1, 2)[:, 0] = first | (middle & 15) << 8
            places.view(-1, 2)[:, 1] = middle >> 4 | last << 4
        else:
            places.copy_(packed.view(torch.uint16).view(-1))
        wide = _taken(scratch, "codes", count, torch.int64)
        wide = wide.view(-1, 2) if bits == 2 else wide  # a table of single numbers is read faster
        weight = torch.index_select(_codes_of_words(bits), 0, places, out=wide)
    weight = weight.view(dtype).view(rows, -1, group_size)
    if zeros is not None:
        weight -= zeros[:, :, None].to(dtype)
    return weight.mul_(scales[:, :, None]).view(rows, columns)


def decode_fp8(codes: Tensor, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
    """float8_e4m3fn `[rows, columns]` in another dtype, exactly; torch's own conversion takes several times as long."""
    if dtype != torch.bfloat16 or codes.numel() % 2 or codes.device.type != "cpu":
        return codes.to(dtype)
    count = codes.numel() // 2
    places = _taken(scratch, "places", count, torch.int32).copy_(codes.view(torch.uint8).view(-1).view(torch.uint16))
    pairs = torch.index_select(_pairs_of_fp8(), 0, places, out=_taken(scratch, "pairs", count, torch.int32))
    return pairs.view(dtype).view(codes.shape)


def linear_tiles(x: Tensor, decode: Callable[[slice, Scratch], Tensor], rows: int) -> Tensor:
    """`x @ W.T` for x `[..., columns]`; `decode` gives some rows of W, asked for a tile at a time."""
    flat = x.reshape(-1, x.shape[-1])
    scratch: Scratch = {}
    result = flat.new_empty(len(flat), rows)
    for start in range(0, rows, TILE_ROWS):
        part = slice(start, min(start + TILE_ROWS, rows))
        result[:, part] = F.linear(flat, decode(part, scratch))
    return result.view(*x.shape[:-1], rows)


# Packed words → their copy in the layout of torch's int4 kernel, as `_packed_codes`: weights that only ever meet many
# tokens, or are decoded as a part of others, have none.
_native_int4 = WeakIdKeyDictionary()


@_kept_whole("packed_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, int bits, int group_size) -> Tensor")
def packed_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """bf16 `[..., columns]` → bf16 `[..., rows]` for codes of up to 4 bits, the faster way for so many tokens.

    Args:
        packed, scales, zeros: as `decode_packed` takes them.
    """
    columns = x.shape[-1]
    learns = torch.is_grad_enabled() and x.requires_grad  # of which torch's kernel has no derivative
    if not learns and dispatch.int4_path(x.numel() // columns, x.dtype, dispatch.cpu_capability()) == "int4pack":
        native = _native_int4.get(packed)
        if native is None:
            codes = unpack_codes(packed, bits, columns)
            native = _native_int4[packed] = pack_int4(codes, scales, zeros, group_size)
        return linear_int4(x, native)

    def decode(rows: slice, scratch: Scratch) -> Tensor:
        some_zeros = None if zeros is None else zeros[rows]
        return decode_packed(packed[rows], scales[rows], some_zeros, bits, columns, group_size, x.dtype, scratch)

    return linear_tiles(x, decode, len(packed))


@cache
def _codes_of_words(bits: int) -> Tensor:
    """For each word of 16 bits, or 12 of 3-bit codes, the bf16 values of its signed codes: four to an int64, two of
    these for 2-bit codes."""
    shifts = bits * torch.arange(8 if bits == 2 else 4)
    codes = (torch.arange(1 << bits * len(shifts))[:, None] >> shifts & (2**bits - 1)) - 2 ** (bits - 1)
    wide = codes.to(torch.bfloat16).contiguous().view(torch.int64)
    return wide if bits == 2 else wide[:, 0].contiguous()


@cache
def _pairs_of_fp8() -> Tensor:
    """For each word of 16 bits, the bf16 values of the two float8_e4m3fn it holds, as an int32."""
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    return words.view(torch.float8_e4m3fn).to(torch.bfloat16).view(torch.int32)
