"""Super-blocks of 256 columns as ggml lays them out, `Q2_K` to `Q6_K`: codes, their scales, and what these are over.

With mins, `W = d * scale * u - dmin * min`, u counting from 0; without, `W = d * scale * q`, q of both signs. Groups of
16 or 32 columns have scales (and mins) of 4 to 8 bits, a super-block has d (and dmin) in half precision. Which type has
what is in `numbers.ROUNDINGS`, under its name in small letters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .numbers import ROUNDINGS, SUPER

BYTES = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}  # of a super-block


class Parts(NamedTuple):
    """What super-blocks hold.

    Attributes:
        codes: signed, int8 `[rows, columns]`; u of the formula, less `2**(bits - 1)`.
        scales: int16 `[rows, groups]`.
        mins: alike, from 0 on; None where there are none.
        units: float16 `[rows, super-blocks, 1 or 2]`: d, and dmin.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    units: Tensor


def decoded(parts: Parts, name: str, dtype: torch.dtype) -> Tensor:
    """The weight `[rows, columns]`."""
    numbers, exact = ROUNDINGS[name].numbers, torch.promote_types(dtype, torch.float32)
    groups = parts.scales.shape[1]
    units = parts.units.to(exact).repeat_interleave(groups // parts.units.shape[1], 1)
    codes = parts.codes.to(exact).unflatten(1, (groups, -1))
    scales = (units[..., 0] * parts.scales)[..., None]
    if parts.mins is None:
        return (codes * scales).flatten(1).to(dtype)
    return ((codes - numbers.low) * scales - (units[..., 1] * parts.mins)[..., None]).flatten(1).to(dtype)


def packed(parts: Parts, name: str) -> Tensor:
    """Their bytes, uint8 `[rows, super-blocks * BYTES]`."""
    numbers = ROUNDINGS[name].numbers
    codes = (parts.codes.to(torch.int16) - int(numbers.low)).to(torch.uint8).unflatten(1, (-1, SUPER))
    groups = parts.scales.unflatten(1, (codes.shape[1], -1))
    mins = None if parts.mins is None else parts.mins.unflatten(1, (codes.shape[1], -1))
    units = [parts.units[..., n : n + 1].contiguous().view(torch.uint8) for n in range(parts.units.shape[2])]
    if name == "q6_k":
        pieces = [
            _joined(codes & 15, 4, 64),
            _joined(codes >> 4, 2, 32),
            groups.to(torch.int8).view(torch.uint8),
            *units,
        ]
    elif name == "q3_k":
        pieces = [_joined(codes >> 2, 1, 32), _joined(codes & 3, 2, 32), _six_bits_alone(groups + 32), *units]
    elif name == "q2_k":
        assert mins is not None
        pieces = [(groups | mins << 4).to(torch.uint8), _joined(codes, 2, 32), *units]
    else:
        assert mins is not None
        high = [_joined(codes >> 4, 1, 32)] if name == "q5_k" else []
        pieces = [*units, _six_bits(groups, mins), *high, _joined(codes & 15, 4, 32)]
    return torch.cat(pieces, 2).flatten(1)


def unpacked(blocks: Tensor, name: str) -> Parts:
    """The inverse of `packed`.

    Raises:
        KeyError, ValueError: there is no such type, or they are no whole super-blocks of it.
    """
    numbers = ROUNDINGS[name].numbers
    if blocks.dtype != torch.uint8 or blocks.shape[1] % BYTES[name]:
        raise ValueError(f"{blocks.dtype} {list(blocks.shape)} is not of whole blocks of {BYTES[name]} bytes")
    cut = blocks.unflatten(1, (-1, BYTES[name]))
    mins = None
    if name == "q6_k":
        low, high, scales, unit = cut.split([128, 64, 16, 2], 2)
        codes = _parted(low, 4, 64) | _parted(high, 2, 32) << 4
        groups, units = scales.contiguous().view(torch.int8).to(torch.int16), [unit]
    elif name == "q3_k":
        high, low, scales, unit = cut.split([32, 64, 12, 2], 2)
        codes = _parted(low, 2, 32) | _parted(high, 1, 32) << 2
        groups, units = _from_six_bits_alone(scales) - 32, [unit]
    elif name == "q2_k":
        scales, low, unit, floor = cut.split([16, 64, 2, 2], 2)
        codes, units = _parted(low, 2, 32), [unit, floor]
        groups, mins = (scales & 15).to(torch.int16), (scales >> 4).to(torch.int16)
    else:
        unit, floor, scales, *more = cut.split([2, 2, 12, *([32] if name == "q5_k" else []), 128], 2)
        codes, units = _parted(more[-1], 4, 32), [unit, floor]
        if name == "q5_k":
            codes = codes | _parted(more[0], 1, 32) << 4
        groups, mins = _from_six_bits(scales)
    return Parts(
        (codes.to(torch.int16) + int(numbers.low)).to(torch.int8).flatten(1),
        groups.flatten(1),
        None if mins is None else mins.flatten(1),
        torch.cat([one.contiguous().view(torch.float16) for one in units], 2),
    )


def _joined(codes: Tensor, bits: int, span: int) -> Tensor:
    """Codes of so many bits `[..., n]` → bytes: those that are `span` apart share one, the first of them lowest."""
    parts = codes.unflatten(2, (-1, 8 // bits, span))
    found = parts[..., 0, :]
    for place in range(1, 8 // bits):
        found = found | parts[..., place, :] << bits * place
    return found.flatten(2)


def _parted(found: Tensor, bits: int, span: int) -> Tensor:
    """The inverse of `_joined`."""
    parts = found.unflatten(2, (-1, span))
    return torch.stack([parts >> shift & 2**bits - 1 for shift in range(0, 8, bits)], 3).flatten(2)


def _six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight scales and eight mins of six bits: four of each in whole bytes, the highest bits of the others on top."""
    first = torch.cat([scales[..., :4] | scales[..., 4:] >> 4 << 6, mins[..., :4] | mins[..., 4:] >> 4 << 6], 2)
    return torch.cat([first, scales[..., 4:] & 15 | (mins[..., 4:] & 15) << 4], 2).to(torch.uint8)


def _from_six_bits(found: Tensor) -> tuple[Tensor, Tensor]:
    scales, mins, others = found.to(torch.int16).split(4, 2)
    return (
        torch.cat([scales & 63, others & 15 | scales >> 6 << 4], 2),
        torch.cat([mins & 63, others >> 4 | mins >> 6 << 4], 2),
    )


def _six_bits_alone(scales: Tensor) -> Tensor:
    """Sixteen scales of six bits, from 0 on: four bits of two in a byte, then two bits of those four apart."""
    return torch.cat([_joined(scales & 15, 4, 8), _joined(scales >> 4, 2, 4)], 2).to(torch.uint8)


def _from_six_bits_alone(found: Tensor) -> Tensor:
    low, high = found.to(torch.int16).split([8, 4], 2)
    return _parted(low, 4, 8) | _parted(high, 2, 4) << 4
