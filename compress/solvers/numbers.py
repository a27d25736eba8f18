"""The numbers that codes stand for before they are scaled: integers, or floats of few bits."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Floats:
    """Floats with a sign, of a finite range.

    Attributes:
        mantissa: bits behind the point.
        least: the exponent of the smallest normal number; smaller ones are spaced as those from there on.
        high: the largest.
    """

    mantissa: int
    least: int
    high: float

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


Numbers = Integers | Floats
E4M3, E2M1 = Floats(3, -6, 448.0), Floats(1, 0, 6.0)
