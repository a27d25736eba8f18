"""What numbers are rounded to: integers or floats of few bits, times a scale that some of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Integers:
    """`-2**(bits-1)` to `2**(bits-1) - 1`, of which a group may be moved by a zero point."""

    bits: int

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def nearest(self, values: Tensor, zeros: Tensor | None = None) -> Tensor:
        """The nearest ones, in place; those of `values + zeros` with a zero point."""
        values.round_()
        if zeros is not None:
            values += zeros
        return values.clamp_(self.low, self.high)

    def beside(self, values: Tensor, nearest: Tensor) -> Tensor:
        """The numbers on the other side of values than their nearest ones, or these where there are none."""
        return (nearest + torch.where(values > nearest, 1.0, -1.0)).clamp_(self.low, self.high)

    def as_bytes(self, numbers: Tensor) -> Tensor:
        """What they are kept as, a byte each."""
        return numbers.to(torch.int8)

    def of_bytes(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The inverse of `as_bytes`."""
        return codes.to(dtype)


@dataclass(frozen=True)
class Floats:
    """Floats with a sign, of a finite range.

    Attributes:
        mantissa: bits behind the point.
        least: the exponent of the smallest normal number; smaller ones are spaced as those from there on.
        high: the largest.
        bits: of one, in all.
    """

    mantissa: int
    least: int
    high: float
    bits: int

    @property
    def low(self) -> float:
        return -self.high

    def nearest(self, values: Tensor, zeros: Tensor | None = None) -> Tensor:
        """The nearest ones, in place, ties to even; there are no zero points."""
        assert zeros is None
        values.clamp_(self.low, self.high)
        exponents = torch.frexp(values).exponent.sub_(1).clamp_(min=self.least)
        spacing = torch.ldexp(torch.ones_like(values), exponents - self.mantissa)
        return values.div_(spacing).round_().mul_(spacing)

    def beside(self, values: Tensor, nearest: Tensor) -> Tensor:
        """The numbers on the other side of values than their nearest ones, or these where there are none."""
        exponents = torch.frexp(nearest).exponent.sub_(1).clamp_(min=self.least).masked_fill_(nearest == 0, self.least)
        # Below a power of two, numbers lie half as far apart as above it.
        away = torch.ldexp(torch.full_like(nearest, BESIDE), exponents - self.mantissa)
        return self.nearest(nearest + torch.where(values > nearest, away, -away))

    def as_bytes(self, numbers: Tensor) -> Tensor:
        """Their bits, a byte each: uint8, of 4 bits in the lower half."""
        if self.bits == 8:
            return numbers.to(torch.float8_e4m3fn).view(torch.uint8)
        places = torch.tensor(_PLACES, dtype=torch.uint8, device=numbers.device)
        return places[(2 * numbers.abs()).long()] | (numbers < 0).to(torch.uint8) << 3

    def of_bytes(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The inverse of `as_bytes`."""
        if self.bits == 8:
            return codes.view(torch.float8_e4m3fn).to(dtype)
        return torch.tensor(_E2M1, dtype=dtype, device=codes.device)[codes.long()]


BESIDE = 0.625  # of the distance between two numbers: nearer to the next, be that half as far away
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = _HALF + tuple(-value for value in _HALF)  # by their bits
_PLACES = tuple(_HALF.index(twice / 2) if twice / 2 in _HALF else 0 for twice in range(13))

SUPER = 256  # columns of a block of nested scales
Numbers = Integers | Floats
E4M3, E2M1 = Floats(3, -6, 448.0, 8), Floats(1, 0, 6.0, 4)


@dataclass(frozen=True)
class Rounding:
    """What a matrix is rounded to.

    Attributes:
        numbers: that are scaled.
        columns: of a row that share a scale; -1: all. The last ones may be fewer.
        rows: that share it with them.
        scales: what scales are: floats of any sign, in the dtype of the model; powers of two (`e8m0`); floats of 8 bits
            (`e4m3`) times a number that the whole matrix has; or integers (`nested`) times a half-precision number that
            `SUPER` columns have. Zero points are then any number: integers in place of scales, over another such.
        levels: bits of a nested scale.
        symmetric: whether there are no zero points.
    """

    numbers: Numbers
    columns: int
    rows: int = field(default=1, kw_only=True)
    scales: Literal["float", "e8m0", "e4m3", "nested"] = "float"
    symmetric: bool = True
    levels: int = 0

    @classmethod
    def integers(cls, bits: int, group_size: int, symmetric: bool = True) -> Rounding:
        return cls(Integers(bits), group_size, symmetric=symmetric)

    @property
    def bits(self) -> int:
        return self.numbers.bits

    @property
    def whole(self) -> int:
        """Columns of which a row has to have a multiple, where it is stored in blocks."""
        return SUPER if self.scales == "nested" else self.columns

    def span(self, columns: int) -> int:
        """Of so many columns, how many really share a scale."""
        return min(self.columns, columns) if self.columns > 0 else columns


# By the names that the field has for them; the blocks of the `mx` ones are those of OCP's Microscaling Formats v1.0,
# those of the `k` ones are ggml's.
ROUNDINGS: dict[str, Rounding] = {
    "int8": Rounding(Integers(8), -1),
    "fp8": Rounding(E4M3, -1),
    "fp8_block": Rounding(E4M3, 128, rows=128),
    "fp8_group": Rounding(E4M3, 128),
    "nvfp4": Rounding(E2M1, 16, scales="e4m3"),
    "mxfp4": Rounding(E2M1, 32, scales="e8m0"),
    "mxfp8": Rounding(E4M3, 32, scales="e8m0"),
    "mxint8": Rounding(Integers(8), 32, scales="e8m0"),
    "q2_k": Rounding(Integers(2), 16, scales="nested", symmetric=False, levels=4),
    "q3_k": Rounding(Integers(3), 16, scales="nested", levels=6),
    "q4_k": Rounding(Integers(4), 32, scales="nested", symmetric=False, levels=6),
    "q5_k": Rounding(Integers(5), 32, scales="nested", symmetric=False, levels=6),
    "q6_k": Rounding(Integers(6), 16, scales="nested", levels=8),
}
