"""Grids: the scale and zero point of each group, and rounding to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.numbers import E4M3, Integers, Rounding
from ...kernels.reference import expand_groups

# Shares of its range that a group may be given, the best of which it takes. Of floats of 4 bits the largest may be
# their 6 or their 4, whose neighbours lie closer (four over six, arXiv:2512.02010); powers of two leave two to choose.
RANGES = {"float": (1.0,), "e4m3": (1.0, 1.5), "e8m0": (1.0, 0.5)}


@dataclass(frozen=True)
class Steps:
    """How scales are stored.

    Attributes:
        dtype: a float; or float8_e8m0fnu, powers of two; or float8_e4m3fn.
        unit: what scales of float8_e4m3fn are times, a power of two.
    """

    dtype: torch.dtype
    unit: float = 1.0

    @classmethod
    def of(cls, rounding: Rounding, model: torch.dtype, largest: float = 1.0) -> Steps:
        """
        Args:
            model: the dtype of the model.
            largest: magnitude among the weights that share a unit.
        """
        if rounding.scales == "float":
            return cls(model)
        if rounding.scales == "e8m0":
            return cls(torch.float8_e8m0fnu)
        top = max(largest, 1e-30) / rounding.numbers.high * max(RANGES["e4m3"])
        return cls(torch.float8_e4m3fn, 2.0 ** math.ceil(math.log2(top / E4M3.high)))

    @property
    def signed(self) -> bool:
        return self.dtype.itemsize > 1

    @property
    def coarse(self) -> bool:
        """Whether a scale has no neighbour that is nearer than half of it."""
        return self.dtype == torch.float8_e8m0fnu

    def storable(self, scales: Tensor) -> Tensor:
        """Scales as they will be read back: rounded (powers of two up), and never zero there."""
        if self.dtype == torch.float8_e8m0fnu:
            mantissa, exponent = torch.frexp(scales)
            return torch.ldexp(torch.ones_like(scales), (exponent - (mantissa == 0.5).int()).clamp_(-126, 127))
        if self.dtype == torch.float8_e4m3fn:
            return E4M3.nearest(scales / self.unit).clamp_(min=2.0**-9).mul_(self.unit)
        # float16's subnormals are scales like others; those of wider exponents are below what float32 can divide by.
        tiny = 2.0**-24 if self.dtype == torch.float16 else torch.finfo(torch.float32).tiny
        rounded = scales.to(self.dtype).to(scales.dtype)
        return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny), rounded)


@dataclass(frozen=True)
class Grid:
    """The values each weight may take: `(code - zero) * scale`.

    Attributes:
        scales: `[rows, groups]`, rounded to what will be stored, never zero.
        zeros: `[rows, groups]` integers in the same dtype, or None when symmetric.
        rounding: what codes are, and which share a scale.
        steps: how scales are stored.
    """

    scales: Tensor
    zeros: Tensor | None
    rounding: Rounding
    steps: Steps

    def columns(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of every column: two `[rows, count]`."""
        size = self.rounding.span(count)
        zeros = None if self.zeros is None else expand_groups(self.zeros, count, size)
        return expand_groups(self.scales, count, size), zeros

    def rows(self, which: Tensor | slice) -> Grid:
        """The grid of some rows."""
        zeros = None if self.zeros is None else self.zeros[which]
        return Grid(self.scales[which], zeros, self.rounding, self.steps)

    @staticmethod
    def stacked(grids: Sequence[Grid]) -> Grid:
        """One grid of the rows of several, all alike but for scales and zeros."""
        first = grids[0]
        zeros = None if first.zeros is None else torch.cat([grid.zeros for grid in grids if grid.zeros is not None])
        return Grid(torch.cat([grid.scales for grid in grids]), zeros, first.rounding, first.steps)

    def where(self, keep: Tensor, other: Grid) -> Grid:
        """This grid in the rows to `keep`, another of the same kind elsewhere."""
        stacked = Grid.stacked([self, other])
        count = len(keep)
        return stacked.rows(torch.arange(count, device=keep.device) + torch.where(keep, 0, count))

    def with_scales(self, scales: Tensor) -> Grid:
        return Grid(self.steps.storable(scales), self.zeros, self.rounding, self.steps)

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of `[rows, columns]`, as floats."""
        scales, zeros = self.columns(weight.shape[1])
        return self.rounded(weight, scales, zeros)

    def rounded(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes of weights that have these scales and zeros, elementwise."""
        return self.rounding.numbers.nearest(torch.div(weight, scales), zeros)

    def values(self, codes: Tensor) -> Tensor:
        scales, zeros = self.columns(codes.shape[1])
        return codes * scales if zeros is None else (codes - zeros) * scales


def by_group(matrix: Tensor, group_size: int) -> Tensor:
    """`[rows, columns]` → `[rows, groups, columns per group]`, a ragged last group filled up with zeros."""
    rows, columns = matrix.shape
    span = group_size if group_size > 0 else columns
    return F.pad(matrix, (0, -columns % span)).view(rows, -1, span)


def range_grid(weight: Tensor, rounding: Rounding, steps: Steps, shrink: Tensor | float = 1.0) -> Grid:
    """The grid that spans each group's range, times `shrink` (`[rows, groups]` or a number).

    Integers without zero points have full-range signed scales: with a the entry of largest magnitude,
    `scale = -a / 2**(bits-1)`, so that a itself is the lowest code and no code is wasted. With zero points they reach
    from min(0, lowest) to max(0, highest). Others reach from minus the largest magnitude to it.
    """
    padded, numbers = by_group(weight, rounding.columns), rounding.numbers
    highest, lowest = padded.amax(2).clamp(min=0), padded.amin(2).clamp(max=0)
    if isinstance(numbers, Integers) and not rounding.symmetric:
        highest, lowest = highest * shrink, lowest * shrink
        scales = steps.storable((highest - lowest) / (2**numbers.bits - 1))
        zeros = ((-lowest / scales).round() + numbers.low).clamp(numbers.low, numbers.high)
        return Grid(scales, zeros, rounding, steps)
    if isinstance(numbers, Integers) and steps.signed:
        extreme = torch.where(highest > -lowest, highest, lowest) * shrink
        return Grid(steps.storable(extreme / numbers.low), None, rounding, steps)
    largest = highest.maximum(-lowest)
    if rounding.rows > 1:
        largest = _shared(largest, rounding.rows)
    return Grid(steps.storable(largest * shrink / numbers.high), None, rounding, steps)


def _shared(largest: Tensor, rows: int) -> Tensor:
    """Of each so many rows of `[rows, groups]` the largest, in the place of all."""
    found = F.pad(largest, (0, 0, 0, -len(largest) % rows)).unflatten(0, (-1, rows)).amax(1)
    return found.repeat_interleave(rows, 0)[: len(largest)]


def searched_grid(
    weight: Tensor, importance: Tensor | None, rounding: Rounding, steps: Steps, ranges: Sequence[float]
) -> Grid:
    """The grid among those of some shares of the ranges with the least `Σ importance (w - ŵ)²` per group.

    Args:
        importance: `[columns]`, the diagonal of the second moment; None for ones.
    """
    if len(ranges) == 1:
        return range_grid(weight, rounding, steps, ranges[0])
    best_shrink = torch.ones(by_group(weight, rounding.columns).shape[:2], dtype=weight.dtype, device=weight.device)
    best_error = torch.full_like(best_shrink, torch.inf)
    for shrink in ranges:
        grid = range_grid(weight, rounding, steps, shrink)
        error = (grid.values(grid.codes(weight)) - weight).square_()
        error = by_group(error if importance is None else error.mul_(importance), rounding.columns).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_shrink = torch.where(better, shrink, best_shrink)
    return range_grid(weight, rounding, steps, best_shrink)
